"""What MultiLoRA and MoE-LoRA share: the settings, the tuner, and a linear layer with stacked low-rank products."""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hycam.adapter.base_tuner import AdapterTuner
from hycam.adapter.config import check_targets, check_tokens, is_finite, is_int
from hycam.adapter.parameters import AdapterLayer, AdapterParameter, AdapterParameters, placement
from hycam.adapter.saved_config import SavedConfig
from hycam.errors import InputError

ALL_LINEAR = "all-linear"


@dataclass
class LowRankConfig(SavedConfig):
    """Settings that MultiLoRA and MoE-LoRA share, in PEFT's vocabulary.

    Args:
        r: rank of each low-rank product.
        lora_alpha: the products are scaled by ``lora_alpha / r``; None: no scale.
        lora_dropout: probability that an entry of the products' input is dropped in training.
        target_modules: names of the linear layers (a list of suffixes, or one regular expression that matches whole
            names), or "all-linear": all of them but the output head.
        exclude_modules: names of layers that get no adapter though `target_modules` has them.
        layers_to_transform: the decoder layers, by index, that get the adapter; None: all. Needs a list of suffixes
            in `target_modules`.
        layers_pattern: name of the list of decoder layers, where PEFT can't find it.
        modules_to_save: other modules to train and to save with the adapter.
        trainable_token_indices: ids of tokens whose embeddings are trained and saved with the adapter: a list for the
            input embedding, or lists by the embeddings' names.

    Raises:
        InputError: (a ValueError) for a value that can't be used; it names the field.
    """

    r: int = 64
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = ALL_LINEAR
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_low_rank(self.r, self.lora_alpha, self.lora_dropout)
        if self.target_modules is None:
            raise InputError(f"target_modules: got None, want {ALL_LINEAR!r} or names of linear layers")
        check_targets(self.target_modules, self.layers_to_transform)
        check_tokens(self.trainable_token_indices)
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)

    @property
    def scaling(self) -> float:
        """The factor of the products."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.r


def check_low_rank(r: Any, lora_alpha: Any, lora_dropout: Any) -> None:
    """Raise `InputError` for a rank, scale or dropout that can't be used."""
    check_count("r", r)
    if lora_alpha is not None and (not is_finite(lora_alpha) or lora_alpha <= 0):
        raise InputError(f"lora_alpha: got {lora_alpha!r}, want a finite number above 0, or none for no scale")
    if not is_finite(lora_dropout) or not 0 <= lora_dropout < 1:
        raise InputError(f"lora_dropout: got {lora_dropout!r}, want a number from 0 to below 1")


def check_count(name: str, value: Any) -> None:
    """Raise `InputError` unless `value` is an integer of at least 1."""
    if not is_int(value) or value < 1:
        raise InputError(f"{name}: got {value!r}, want an integer of at least 1")


class LowRankLinear(nn.Module, AdapterLayer):
    """A linear layer with adapters beside it: ``y = base(x) + sum over active adapters of delta(x)``.

    An adapter runs in its parameters' dtype, or in autocast's where that is on, as PEFT's LoRA does; the output has the
    base layer's dtype.

    Args:
        base_layer: a module with `in_features` and `out_features` (`nn.Linear`, and the quantised ones), or a `Conv1D`
            of transformers. It is frozen; the adapter takes its device, dtype and `training`.
        config: the adapter's settings.
        adapter_name: name of the adapter.

    Raises:
        InputError: (a ValueError) for another module.
    """

    other_param_names = ("adapter_configs",)

    def __init__(self, base_layer: nn.Module, config: LowRankConfig, *, adapter_name: str = "default") -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.training = base_layer.training
        for name in self.adapter_layer_names:
            setattr(self, name, AdapterParameters().train(self.training))
        self.adapter_configs: dict[str, Any] = {}
        self._active_adapter = adapter_name
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        sizes = features(self.get_base_layer())
        if sizes is None:
            raise InputError(f"base_layer: got a {type(base_layer).__name__}, want a linear layer")
        self.in_features, self.out_features = sizes
        self.update_layer(adapter_name, config)

    @abstractmethod
    def parameter_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Name -> shape of an adapter's parameters."""

    @abstractmethod
    def initialise(self, name: str, parameter: Tensor) -> None:
        """Give a parameter its starting values."""

    @abstractmethod
    def delta(self, adapter_name: str, x: Tensor) -> Tensor:
        """What the adapter adds to the base layer's output, [..., out_features], for its input [..., in_features]."""

    def update_layer(self, adapter_name: str, config: Any, inference_mode: bool = False) -> None:
        """Add an adapter, freshly initialised; it is active only where it is the active adapter by name."""
        device, dtype = placement(self.base_layer)
        for name, shape in self.parameter_shapes(config).items():
            parameter = AdapterParameter(torch.empty(shape, device=device, dtype=dtype))
            self.initialise(name, parameter.weight)
            getattr(self, name)[adapter_name] = parameter.train(self.training)
        self.adapter_configs[adapter_name] = config
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for adapter_name in self.active_adapters:
            if adapter_name in self.adapter_configs:
                result = result + self.delta(adapter_name, x)
        return result.to(dtype)

    def _dropped(self, adapter_name: str, x: Tensor) -> Tensor:
        return F.dropout(x, self.adapter_configs[adapter_name].lora_dropout, self.training)


class LowRankModel(AdapterTuner):
    """Puts a `LowRankLinear` in the place of the linear layers of a model."""

    tuner_layer_cls: type[LowRankLinear]

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check the targets before a module is replaced."""
        if peft_config.target_modules == ALL_LINEAR:
            return
        for name, module in self._targets(peft_config, model).items():
            base = module.get_base_layer() if isinstance(module, AdapterLayer) else module
            if features(base) is None:
                raise InputError(
                    f"target_modules: got {_shown(peft_config.target_modules)}, matching {name}, a "
                    f"{type(module).__name__}; want linear layers"
                )

    def _new_layer(self, target: nn.Module, peft_config: Any, adapter_name: str) -> LowRankLinear:
        return self.tuner_layer_cls(target, peft_config, adapter_name=adapter_name)


def features(module: nn.Module) -> tuple[int, int] | None:
    """Input and output size of a linear layer, None for any other module."""
    names = ("nx", "nf") if isinstance(module, Conv1D) else ("in_features", "out_features")
    size_in, size_out = (getattr(module, name, None) for name in names)
    return (size_in, size_out) if isinstance(size_in, int) and isinstance(size_out, int) else None


def _shown(targets: str | Iterable[str]) -> str:
    return repr(targets) if isinstance(targets, str) else repr(sorted(targets))
