"""MultiLoRA (arXiv 2311.11501): low-rank products side by side, each with a trained scale for every output."""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hycam.adapter.parameters import AdapterParameters, kaiming_uniform
from hycam.adapter.peft_type import ForeignPeftType
from hycam.errors import InputError
from hycam.methods.low_rank import LowRankConfig, LowRankLinear, LowRankModel, check_count

MULTILORA = ForeignPeftType("MULTILORA")

_PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "budget_matched": {"r": 16, "num_adapters": 4}}


@dataclass
class MultiLoraConfig(LowRankConfig):
    """Settings of a MultiLoRA adapter: `LowRankConfig`'s, and these.

    Args:
        num_adapters: number n of parallel products.
    """

    num_adapters: int = 5

    method_name: ClassVar[str] = "MultiLoRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MULTILORA
        check_count("num_adapters", self.num_adapters)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "MultiLoraConfig":
        """The settings called `name`, changed by `overrides`.

        "paper" (n = 5, r = 64), and "budget_matched" (n = 4, r = 16: all ranks together are a LoRA's 64).
        """
        if name not in _PRESETS:
            raise InputError(f"preset: got {name!r}, want one of {', '.join(_PRESETS)}")
        return cls(**(_PRESETS[name] | overrides))


class MultiLoraLinear(LowRankLinear):
    """``y = base(x) + (lora_alpha / r) * sum_i s_i * (B_i A_i drop(x))``, see `LowRankLinear`.

    Parameters of an adapter: `multilora_A` [n, r, in] and `multilora_B` [n, out, r], both Kaiming-uniform (a = sqrt 5)
    per product, and `multilora_scale` s [n, out], zero.
    """

    adapter_layer_names = ("multilora_A", "multilora_B", "multilora_scale")
    stacked_names = adapter_layer_names
    multilora_A: AdapterParameters  # noqa: N815 (as PEFT writes lora_A and lora_B)
    multilora_B: AdapterParameters  # noqa: N815
    multilora_scale: AdapterParameters

    def parameter_shapes(self, config: MultiLoraConfig) -> dict[str, tuple[int, ...]]:
        n, r = config.num_adapters, config.r
        return {
            "multilora_A": (n, r, self.in_features),
            "multilora_B": (n, self.out_features, r),
            "multilora_scale": (n, self.out_features),
        }

    def initialise(self, name: str, parameter: Tensor) -> None:
        if name == "multilora_scale":
            nn.init.zeros_(parameter)
        else:
            kaiming_uniform(parameter)

    def delta(self, adapter_name: str, x: Tensor) -> Tensor:
        down, up = self._factors(adapter_name)
        x = self._dropped(adapter_name, self._cast_input_dtype(x, down.dtype))
        return F.linear(F.linear(x, down), up)

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The sum of products as one of rank n * r: A [n * r, in], and the scaled B [out, n * r]."""
        lora_a, lora_b, scale = (getattr(self, name)[adapter_name]() for name in self.adapter_layer_names)
        scaled = self.adapter_configs[adapter_name].scaling * scale[..., None] * lora_b
        return lora_a.flatten(0, 1), scaled.transpose(0, 1).flatten(1)

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the base layer's weight, in that weight's layout; at least float32."""
        down, up = (
            factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in self._factors(adapter_name)
        )
        weight = up @ down
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base layer's weight.

        Args:
            safe_merge: check that the sum is finite before it replaces the weight.
            adapter_names: those to merge; None: the active ones.

        Raises:
            ValueError: a sum that is not finite under `safe_merge`.
            NotImplementedError: a quantised weight.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name in self.adapter_configs:
                self._add_to_weight(adapter_name, 1, check=safe_merge)
                self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Take the merged adapters off the base layer's weight again, up to the weight's rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._add_to_weight(self.merged_adapters.pop(), -1)

    @torch.no_grad()
    def _add_to_weight(self, adapter_name: str, sign: int, *, check: bool = False) -> None:
        weight: Any = self.get_base_layer().weight
        if not weight.is_floating_point() or weight.element_size() == 1:
            raise NotImplementedError(
                f"MultiLoRA: the base layer's weight is {weight.dtype}, want a float weight: load the backbone "
                "unquantised to merge"
            )
        merged = (weight + sign * self.get_delta_weight(adapter_name)).to(weight.dtype)
        if check and not merged.isfinite().all():
            raise ValueError(f"adapter {adapter_name!r}: the merged weight is not finite, want a finite one")
        weight.data.copy_(merged)


class MultiLoraModel(LowRankModel):
    """MultiLoRA as a PEFT tuner."""

    prefix = "multilora_"
    tuner_layer_cls = MultiLoraLinear
