"""A recipe's `method` section: what is trained, by name, with the fields of that method."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from hycam.adapter.config import HyCAMConfig, check_targets, is_int
from hycam.adapter.saved_config import SavedConfig
from hycam.errors import InputError
from hycam.methods import MoeLoraConfig, MultiLoraConfig, RiemannianPreconditioner, set_gate_learning_rate
from hycam.methods.low_rank import ALL_LINEAR, check_low_rank
from hycam.methods.optimizer import check_delta, check_gate_lr_ratio
from hycam.training.schema import Reader
from hycam_kernels import explain_backend

MethodName = Literal["hycam", "full", "lora", "multilora", "moelora", "riemoe"]

# Fields of `LoraConfig` that need nothing beside them: no pass over data, no change of the backbone's own weights.
_LORA_FIELDS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "modules_to_save",
)
# RieMoE-LoRA's published training: the gates' rates as shares of the experts', and alpha / r.
_GATE_LR_RATIO, _GATE_LR_RATIO_OF_SGD = 0.003, 0.001
_MOE_SCALE = 4

_IN_16_BITS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Optimizers whose moments have the weights' dtype.
_PYTORCH_ADAMW = ("adamw_torch", "adamw_torch_fused")

_GATE_FIELDS = {"gate_lr_ratio": float}
_RIEMANNIAN_FIELDS = {"delta": float}
_WITH_PRESETS: dict[str, type[HyCAMConfig] | type[MultiLoraConfig]] = {
    "hycam": HyCAMConfig,
    "multilora": MultiLoraConfig,
}


@dataclass
class MethodConfig:
    """What is trained.

    Attributes:
        name: `hycam`; `full`: the backbone itself; or an adapter that HyCAM is compared with.
        preset: of `HyCAMConfig` or `MultiLoraConfig`; the other methods have none.
        autocast_adapter_dtype: keep the adapter in float32 beside a backbone of bfloat16 or float16; `full` has none.
        init_from: folder of a trained adapter of the method, from whose weights this one starts; `full` has none.
        options: fields of the method that differ from the preset or the defaults.
    """

    name: MethodName = "hycam"
    preset: str | None = None
    autocast_adapter_dtype: bool = True
    init_from: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.preset is None and self.name in _WITH_PRESETS:
            self.preset = "paper"

    def adapter_config(self) -> PeftConfig | None:
        """The adapter's settings, None for full fine-tuning. Raises `InputError` for a value that can't be used."""
        training = _GATE_FIELDS | _RIEMANNIAN_FIELDS
        options: dict[str, Any] = {name: value for name, value in self.options.items() if name not in training}
        options["task_type"] = "CAUSAL_LM"
        if self.name in _WITH_PRESETS:
            assert self.preset is not None
            return _WITH_PRESETS[self.name].preset(self.preset, **options)
        if self.name == "lora":
            return _lora_config(options)
        if self.name == "full":
            return None
        if "gate_lr_ratio" in self.options:
            check_gate_lr_ratio(self.options["gate_lr_ratio"])
        rank = options.get("r", MoeLoraConfig.r)
        if options.get("lora_alpha") is None and is_int(rank):
            options["lora_alpha"] = _MOE_SCALE * rank
        if self.name == "riemoe":
            check_delta(self.delta)
            options = {"gate_correction": "engineering"} | options
        return MoeLoraConfig(**options)

    def gate_lr_ratio(self, optimizer: Optimizer) -> float:
        """The gates' learning rate, as a share of the trainer's."""
        upstream = _GATE_LR_RATIO_OF_SGD if isinstance(optimizer, torch.optim.SGD) else _GATE_LR_RATIO
        return self.options.get("gate_lr_ratio", upstream)

    @property
    def delta(self) -> float:
        """What the Riemannian preconditioner adds to the diagonals."""
        return self.options.get("delta", 1e-6)

    def check_backend(self, device: torch.device) -> None:
        """Raise `InputError` where HyCAM's kernels are asked for on a device, or for experts, that they can't run."""
        config = self.adapter_config()
        if not isinstance(config, HyCAMConfig) or config.backend != "triton":
            return
        token = torch.zeros(1, 16, device=device)
        weight = torch.zeros(1, 16, 16, device=device)
        if config.experts == "full":
            reason = explain_backend(
                token, token, None, None, None, None, token, expert_weight=weight, backend="triton"
            )
        else:
            reason = explain_backend(token, token, weight[0], None, None, None, None, backend="triton")
        if not reason.startswith("triton"):
            raise InputError(f"method.backend: got triton, wanted auto or torch: {reason.removeprefix('torch: ')}")

    def losses_in_16_bits(self, dtype: object, trainer: Mapping[str, Any]) -> Iterator[str]:
        """Warnings of what is lost in weights that train in `dtype`: steps of the usual size, and AdamW's forgetting.

        Args:
            dtype: the backbone's.
            trainer: a recipe's section. Under DeepSpeed nothing is lost: it keeps float32 weights by itself.
        """
        held = _IN_16_BITS.get(str(dtype).removeprefix("torch."))
        if held is None or trainer.get("deepspeed"):
            return
        config = self.adapter_config()
        trains_others = any(getattr(config, name, None) for name in ("train_norms", "modules_to_save"))
        if trains_others:
            yield (
                "trained norms and modules_to_save in 16 bits: unlike the adapter they keep the backbone's dtype, in "
                "which most updates round to nothing; backbone.dtype: float32 with trainer.bf16: true keeps float32 "
                "weights and computes in bfloat16"
            )
        if self.name == "full":
            yield (
                "full fine-tuning in 16 bits: training at 2e-5 leaves 78% of bfloat16 weights where they were "
                "(float32: 22%), while adapters are float32; backbone.dtype: float32 with trainer.bf16: true keeps "
                "float32 weights and computes in bfloat16"
            )
        beta2 = trainer.get("adam_beta2", TrainingArguments.adam_beta2)
        decay = torch.finfo(held).eps / 2
        trains = trains_others or self.name == "full" or not self.autocast_adapter_dtype
        if trains and trainer.get("optim", TrainingArguments.optim) in _PYTORCH_ADAMW and 1 - beta2 < decay:
            yield (
                f"trainer.adam_beta2: {beta2} with weights that train in {dtype}: AdamW's second moment rounds back to "
                "what it was, so that steps stay small for good after one large gradient; wanted float32 weights "
                "(method.autocast_adapter_dtype: true, backbone.dtype: float32), or a smaller one, such as 0.99"
            )

    def prepare_optimizer(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Give an optimizer that was just made what the method changes in it."""
        if self.name in ("moelora", "riemoe"):
            set_gate_learning_rate(optimizer, model, self.gate_lr_ratio(optimizer))
        if self.name == "riemoe":
            optimizer.register_step_pre_hook(RiemannianPreconditioner(model, self.delta))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a recipe has them."""
        preset = {} if self.preset is None else {"preset": self.preset}
        dtype = {} if self.autocast_adapter_dtype else {"autocast_adapter_dtype": False}
        start = {} if self.init_from is None else {"init_from": self.init_from}
        return {"name": self.name, **preset, **dtype, **start, **self.options}


def method_fields(name: str) -> dict[str, Any]:
    """Name -> type of the fields that a recipe's section of this method may have, beside `name`."""
    if name == "full":
        return {}
    fields: dict[str, Any] = {"autocast_adapter_dtype": bool, "init_from": str | None}
    if name == "lora":
        hints = typing.get_type_hints(LoraConfig)
        return fields | {name: hints[name] for name in _LORA_FIELDS} | {"lora_alpha": float | None}
    if name in _WITH_PRESETS:
        return fields | {"preset": str, **_own_fields(_WITH_PRESETS[name])}
    fields |= _own_fields(MoeLoraConfig) | _GATE_FIELDS
    return fields | _RIEMANNIAN_FIELDS if name == "riemoe" else fields


def method_section(reader: Reader, value: Any) -> dict[str, Any]:
    """The values of `MethodConfig` from a recipe's section."""
    name = value.get("name", "hycam") if isinstance(value, Mapping) else "hycam"
    reader.convert(name, MethodName, "method.name")
    options = reader.fields(value, {"name": MethodName, **method_fields(name)}, "method")
    own = ("name", "preset", "autocast_adapter_dtype", "init_from")
    head = {key: options.pop(key) for key in own if key in options}
    return head | {"options": options}


def _own_fields(config: type[PeftConfig]) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    inherited = {base_field.name for base_field in dataclasses.fields(SavedConfig)}
    return {item.name: hints[item.name] for item in dataclasses.fields(config) if item.name not in inherited}


def _lora_config(options: dict[str, Any]) -> LoraConfig:
    """PEFT's LoRA; r = 64 on all linear layers, without a scale, unless the options say otherwise."""
    defaults: dict[str, Any] = {"r": 64, "target_modules": ALL_LINEAR, "lora_alpha": None}
    options = defaults | options
    check_low_rank(options["r"], options["lora_alpha"], options.get("lora_dropout", 0.0))
    if options["target_modules"] is None:
        raise InputError(f"target_modules: got null, want {ALL_LINEAR!r} or names of linear layers")
    check_targets(options["target_modules"], options.get("layers_to_transform"))
    if options["lora_alpha"] is None:
        options["lora_alpha"] = options["r"]
    return LoraConfig(**options)
