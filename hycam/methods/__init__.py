"""The PEFT methods that a user compares HyCAM with, where PEFT lacks them: MultiLoRA, MoE-LoRA and RieMoE-LoRA."""

from hycam.methods.moelora import MoeLoraConfig, MoeLoraLinear, MoeLoraModel
from hycam.methods.multilora import MultiLoraConfig, MultiLoraLinear, MultiLoraModel
from hycam.methods.optimizer import RiemannianPreconditioner, set_gate_learning_rate

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
