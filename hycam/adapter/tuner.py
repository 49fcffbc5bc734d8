"""HyCAM as a PEFT tuner."""

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.save_and_load import set_peft_model_state_dict
from torch import nn

from hycam.adapter.architectures import (
    hidden_size_of,
    model_type_of,
    residual_norm,
    trained_norms,
)
from hycam.adapter.attention import HyCAMAttention
from hycam.adapter.base_tuner import AdapterTuner
from hycam.adapter.binding import each_row_by, install, uninstall
from hycam.adapter.combination import check_combination, weighted_sum
from hycam.adapter.config import HyCAMConfig
from hycam.adapter.discovery import self_attention_names
from hycam.adapter.mixed_batch import row_adapters_of
from hycam.adapter.norm_fusion import fusible_norms
from hycam.errors import InputError


class HyCAMModel(AdapterTuner):
    """Wraps the self-attentions of a model in `HyCAMAttention`, and binds them to its calls."""

    prefix = "hycam_"
    tuner_layer_cls = HyCAMAttention

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # PEFT copies the norms that it trains, and would copy hooks with them: they come off first.
        uninstall(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            install(model)

    def unload(self) -> nn.Module:
        """Return the bare backbone, with its own norms where `train_norms` trained copies of them."""
        uninstall(self.model)
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                self.model.set_submodule(name, module.original_module)
        return super().unload()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        with super()._enable_peft_forward_hooks(*args, **kwargs | {"adapter_names": None}):
            if kwargs.get("adapter_names") is None:
                yield
                return
            if self.training:
                raise InputError("adapter_names: got names in training mode, want model.eval(), or one adapter a batch")
            defaults = getattr(self.model, "generation_config", None)
            with each_row_by(self.model, row_adapters_of(kwargs, list(self.peft_config), defaults)):
                yield

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose every parameter is the weighted sum of the given adapters' parameters.

        With weights that sum to 1 this averages adapters that were trained from one start. What the adapters do isn't
        linear in their parameters, so weights don't scale it. What is trained with them (`train_norms`,
        `modules_to_save`, `trainable_token_indices`) is summed too. The new adapter is frozen and not active.

        Args:
            adapters: names of loaded adapters with the same settings.
            weights: one number for each; they may be negative.
            adapter_name: the new adapter's name.
            combination_type: "linear"; PEFT's others are about LoRA's products.

        Raises:
            InputError: (a ValueError), before anything is added, for another value of these.
        """
        check_combination(self.peft_config, adapters, weights, adapter_name, combination_type)
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapters[0]])
        self.peft_config[adapter_name].inference_mode = True
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        set_peft_model_state_dict(self, weighted_sum(self, adapters, weights), adapter_name)

    def disable_adapter_layers(self) -> None:
        self._enable_adapter_layers(enabled=False)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> HyCAMConfig:
        if peft_config.target_modules is None:
            layers = peft_config.layers_to_transform
            wanted = [layers] if isinstance(layers, int) else layers
            peft_config.target_modules = self_attention_names(self.model, wanted)
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check all that can be checked before a module is replaced; add the norms to `modules_to_save`."""
        # trainers set fields after the settings are made
        peft_config.check()
        targets = self._targets(peft_config, model)
        for name, module in targets.items():
            _check_is_attention(name, module, peft_config)
            if peft_config.modulation == "residual":
                residual_norm(model_type_of(module) or model_type_of(model))
            if peft_config.fuse_norm:
                decoder_layer = model.get_submodule(name.rpartition(".")[0])
                fusible_norms(decoder_layer, model_type_of(module) or model_type_of(model))
        _check_layers_exist(peft_config, targets)
        if peft_config.train_norms:
            norms = _norm_names(targets, model)
            peft_config.modules_to_save = sorted(norms.union(peft_config.modules_to_save or ()))

    def _targets(self, peft_config: Any, model: nn.Module) -> dict[str, nn.Module]:
        targets = super()._targets(peft_config, model)
        if not targets:
            layers, excluded = peft_config.layers_to_transform, peft_config.exclude_modules
            raise InputError(
                f"target_modules: got {_shown(peft_config.target_modules)}"
                f"{'' if layers is None else f' with layers_to_transform={layers}'}"
                f"{f' and exclude_modules={_shown(excluded)}' if excluded else ''}, which matches no module of "
                f"{type(model).__name__}, want its self-attention modules"
            )
        return targets

    def _new_layer(self, target: nn.Module, peft_config: Any, adapter_name: str) -> HyCAMAttention:
        hidden_size = hidden_size_of(target) or hidden_size_of(self.model)
        return HyCAMAttention(target, peft_config, hidden_size, adapter_name=adapter_name)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        """PEFT's check is about LoRA-like `bias` modes; HyCAM's `bias` is a flag."""

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        kept: set[int] = set()
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                kept.update(map(id, module.parameters()))
            elif isinstance(module, BaseTunerLayer):
                base = set(map(id, module.get_base_layer().parameters()))
                kept.update(id(parameter) for parameter in module.parameters() if id(parameter) not in base)
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)

    @classmethod
    def _get_learnable_bias_state_dict(cls, model: nn.Module, state_dict: dict, config: PeftConfig) -> dict:
        return {}

    def _check_merge_allowed(self) -> NoReturn:
        raise NotImplementedError(
            "HyCAM can't be merged into a backbone: the modulation depends on the input; unload() returns it bare"
        )


def _check_is_attention(name: str, module: nn.Module, peft_config: HyCAMConfig) -> None:
    if isinstance(module, HyCAMAttention):
        return
    takes_mask = "attention_mask" in inspect.signature(module.forward).parameters
    if isinstance(module, BaseTunerLayer) or not takes_mask or next(module.children(), None) is None:
        raise InputError(
            f"target_modules: got {_shown(peft_config.target_modules)}, matching {name}, a {type(module).__name__}; "
            "want self-attention modules: they take an attention_mask and return (output, ...)"
        )


def _norm_names(targets: dict[str, nn.Module], model: nn.Module) -> set[str]:
    """The norms around the adapted attentions, for `modules_to_save`: by path where others have the same name."""
    paths: dict[str, set[str]] = {}
    for name, module in targets.items():
        for norm in trained_norms(model_type_of(module) or model_type_of(model)):
            paths.setdefault(norm, set()).add(f"{name.rpartition('.')[0]}.{norm}")
    named = [name for name, _ in model.named_modules()]
    is_whole = {norm: sum(name.endswith(norm) for name in named) == len(wanted) for norm, wanted in paths.items()}
    return {name for norm, wanted in paths.items() for name in ({norm} if is_whole[norm] else wanted)}


def _check_layers_exist(peft_config: HyCAMConfig, targets: Iterable[str]) -> None:
    wanted = peft_config.layers_to_transform
    indices = [] if wanted is None else [wanted] if isinstance(wanted, int) else wanted
    missing = [index for index in indices if not any(f".{index}." in f".{name}" for name in targets)]
    if missing:
        raise InputError(f"layers_to_transform: got {missing}, want indices of layers with self-attention")


def _shown(targets: Any) -> str:
    return repr(targets) if isinstance(targets, str) else repr(sorted(targets))
