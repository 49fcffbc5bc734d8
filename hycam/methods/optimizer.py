"""What RieMoE-LoRA (arXiv 2502.15828) changes in the optimizer: preconditioned gradients, and the gates' own rate."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hycam.adapter.config import is_finite
from hycam.errors import InputError
from hycam.methods.moelora import MoeLoraLinear


class RiemannianPreconditioner:
    """Preconditions the gradients of MoE-LoRA experts before an optimizer's step sees them.

    For each expert, from the factors as they are before the step::

        grad_A <- (B^T B + delta I)^-1 grad_A        grad_B <- grad_B (A A^T + delta I)^-1

    An expert's gradient stays plain where its r x r system is singular in float64, in which the systems are formed and
    factorised: all those of one r at once. Use, with any optimizer of torch::

        optimizer.register_step_pre_hook(RiemannianPreconditioner(model))

    Args:
        model: has MoE-LoRA layers; their trainable adapters count.
        delta: added to the diagonals, at least 0.

    Raises:
        InputError: (a ValueError) for a `delta` that can't be used, or a model without MoE-LoRA layers.
        RuntimeError: in a step, where no expert has a gradient (DeepSpeed's ZeRO keeps them elsewhere) or weights are
            sharded (FSDP).
    """

    def __init__(self, model: nn.Module, delta: float = 1e-6) -> None:
        check_delta(delta)
        self.layers = _layers(model)
        self.delta = delta

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
        """A step pre-hook of `torch.optim.Optimizer`: rewrites the gradients in place."""
        # gradient, its factor's partner as columns [E, long, r], and whether the r x r matrix multiplies on the left
        systems: dict[tuple[int, torch.device], list[tuple[Tensor, Tensor, bool]]] = defaultdict(list)
        for lora_a, lora_b in self._factors():
            if isinstance(lora_a, DTensor):
                raise RuntimeError("RiemannianPreconditioner: the experts are sharded (FSDP), want whole ones")
            for parameter, partner, is_left in ((lora_a, lora_b, True), (lora_b, lora_a.mT, False)):
                if parameter.grad is not None:
                    systems[partner.shape[-1], partner.device].append((parameter.grad, partner, is_left))
        if not systems:
            raise RuntimeError(
                "RiemannianPreconditioner: no expert has a gradient, want one after backward; DeepSpeed's ZeRO, which "
                "keeps gradients elsewhere, can't be used with it"
            )
        for group in systems.values():
            inverses, is_singular = self._inverses([partner for _, partner, _ in group])
            for (gradient, _, is_left), inverse, singular in zip(group, inverses, is_singular, strict=True):
                inverse = inverse.to(torch.promote_types(gradient.dtype, torch.float32))
                plain = gradient.to(inverse.dtype)
                conditioned = inverse @ plain if is_left else plain @ inverse
                gradient.copy_(torch.where(singular[:, None, None], plain, conditioned))

    def _factors(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        for layer in self.layers:
            for name in layer.adapter_configs:
                yield layer.moelora_A[name](), layer.moelora_B[name]()

    def _inverses(self, partners: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """For each [E, long, r] the inverses [E, r, r] of ``P^T P + delta I``, and which of them [E] don't exist."""
        sizes = [len(partner) for partner in partners]
        gram = torch.cat([(long := partner.double()).mT @ long for partner in partners])
        gram.diagonal(dim1=-2, dim2=-1).add_(self.delta)
        factor, info = torch.linalg.cholesky_ex(gram)
        # a singular matrix can have a pivot of rounding alone, that of a sum over the long dimension
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        rounding = torch.finfo(gram.dtype).eps * max(partner.shape[-2] for partner in partners)
        is_singular = (info > 0) | ~(pivots.amin(-1) > rounding * pivots.amax(-1))
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor = torch.where(is_singular[:, None, None], identity, factor)
        return list(torch.cholesky_inverse(factor).split(sizes)), list(is_singular.split(sizes))


def set_gate_learning_rate(optimizer: torch.optim.Optimizer, model: nn.Module, ratio: float) -> None:
    """Move a model's MoE-LoRA gates to parameter groups of their own, at `ratio` times their group's learning rate.

    To be called before a learning-rate scheduler is made. The groups keep their other settings.

    Raises:
        InputError: (a ValueError) for a ratio that is not above 0, or a model without MoE-LoRA layers.
    """
    check_gate_lr_ratio(ratio)
    gates = {id(gate) for layer in _layers(model) for gate in layer.moelora_gate.parameters()}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in gates]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gates]
            optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * ratio})


def check_delta(delta: Any) -> None:
    """Raise `InputError` for a damping that can't be used."""
    if not is_finite(delta) or delta < 0:
        raise InputError(f"delta: got {delta!r}, want a finite number of at least 0")


def check_gate_lr_ratio(ratio: Any) -> None:
    """Raise `InputError` for a share of the learning rate that can't be used."""
    if not is_finite(ratio) or ratio <= 0:
        raise InputError(f"gate_lr_ratio: got {ratio!r}, want a finite number above 0")


def _layers(model: nn.Module) -> list[MoeLoraLinear]:
    layers = [module for module in model.modules() if isinstance(module, MoeLoraLinear)]
    if not layers:
        raise InputError(f"model: got {type(model).__name__} without a MoE-LoRA layer, want one that has some")
    return layers
