"""The PEFT methods that a user compares HyCAM with, where PEFT lacks them: MultiLoRA, MoE-LoRA and RieMoE-LoRA."""

from .moelora import MoeLoraConfig, MoeLoraLinear, MoeLoraModel
from .multilora import MultiLoraConfig, MultiLoraLinear, MultiLoraModel
from .optimizer import RiemannianPreconditioner, set_gate_learning_rate

__all__ = [
    "MoeLoraConfig",
    "MoeLoraLinear",
    "MoeLoraModel",
    "MultiLoraConfig",
    "MultiLoraLinear",
    "MultiLoraModel",
    "RiemannianPreconditioner",
    "set_gate_learning_rate",
]
