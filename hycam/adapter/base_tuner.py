"""What this package's tuners need beyond PEFT's base class."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from hycam.adapter.binding import check_forward_arguments
from hycam.adapter.parameters import AdapterLayer, AdapterParameters


class AdapterTuner(BaseTuner):
    """Replaces the modules that a configuration targets by adapted layers."""

    tuner_layer_cls: type[AdapterLayer]

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        if isinstance(peft_config, PeftConfig):
            # Injected without a PeftModel around it, which would give a dictionary. transformers' own loader puts the
            # adapter's name behind a file's names, and looks them up in the state dict.
            for module in model.modules():
                if isinstance(module, AdapterParameters) and adapter_name in module:
                    module.use_saved_name(adapter_name)

    @abstractmethod
    def _new_layer(self, target: nn.Module, peft_config: Any, adapter_name: str) -> Any:
        """The layer that wraps `target`, with one adapter."""

    def _targets(self, peft_config: PeftConfig, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that get the adapter, by path."""
        wrapped = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        return {
            name: module
            for name, module in model.named_modules()
            if name and not name.startswith(wrapped) and self._check_target_module_exists(peft_config, name)
        }

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            layer: Any = target
            layer.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode)
            return
        layer = self._new_layer(target, peft_config, adapter_name)
        if adapter_name not in self.active_adapters:
            layer.set_adapter(self.active_adapters)
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return cls.tuner_layer_cls.saved_name(super()._remove_adapter_name_from_key(key, adapter_name))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        check_forward_arguments(kwargs)
        yield
