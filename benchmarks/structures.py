"""Ways to arrange the op's library products, to choose a structure by: separate or joined, and two batched ones.

Joined products take the weights [W_s; M] or the gradients [dS | dV] as one matrix, ready-made: what joining itself
costs (a copy of the weights, or packed storage) is not in these times.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .measure import Session, dtype_name
from .shapes import Shape
from .timing import Work, alternate


def measure_structures(session: Session, shape: Shape, dtype: torch.dtype) -> None:
    """Times of the arrangements below at one shape."""
    if not session.starts(3, "structure", shape):
        return
    sets = [_operands(shape, dtype, session.device) for _ in range(2)]
    for timer in session.timers:
        samplers = {
            name: timer.prepare(Work(lambda i: sets[i], partial(_apply, function), len(sets)))
            for name, function in ARRANGEMENTS.items()
        }
        for name, samples in alternate(samplers, session.rounds, session.budget.lasts).items():
            session.add("structure", shape, dtype=dtype_name(dtype), what=name, method=timer.method, samples_us=samples)


def _apply(function: Callable[..., object], operands: dict[str, Tensor]) -> object:
    return function(**operands)


def _operands(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    T, d, E, r = shape.tokens, shape.d, shape.num_experts, shape.rank

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(dtype)

    return {
        "h": draw(T, d), "weights": draw(d + E * r, d), "d_products": draw(T, d + E * r), "d_z": draw(E, T, d),
        "b": draw(E, d, r), "v": draw(E, T, r),
    }  # fmt: skip


def _products_separate(h: Tensor, weights: Tensor, **_) -> tuple[Tensor, Tensor]:
    d = h.shape[1]
    return h @ weights[:d].T, h @ weights[d:].T


def _products_joined(h: Tensor, weights: Tensor, **_) -> Tensor:
    return h @ weights.T


def _d_hidden_separate(h: Tensor, weights: Tensor, d_products: Tensor, **_) -> Tensor:
    d = h.shape[1]
    return torch.addmm(d_products[:, :d] @ weights[:d], d_products[:, d:], weights[d:])


def _d_hidden_joined(weights: Tensor, d_products: Tensor, **_) -> Tensor:
    return d_products @ weights


def _d_weights_separate(h: Tensor, d_products: Tensor, **_) -> tuple[Tensor, Tensor]:
    d = h.shape[1]
    return d_products[:, :d].T @ h, d_products[:, d:].T @ h


def _d_weights_joined(h: Tensor, d_products: Tensor, **_) -> Tensor:
    return d_products.T @ h


def _batched_from_d_z(d_z: Tensor, b: Tensor, v: Tensor, **_) -> tuple[Tensor, Tensor]:
    """dV and dB where dZ [E, T, d] is written out: what a kernel that never writes it has to beat."""
    return d_z @ b, d_z.mT @ v


ARRANGEMENTS: dict[str, Callable[..., object]] = {
    "S and V, separate": _products_separate,
    "S and V, joined": _products_joined,
    "dh, separate": _d_hidden_separate,
    "dh, joined": _d_hidden_joined,
    "dW, separate": _d_weights_separate,
    "dW, joined": _d_weights_joined,
    "dV and dB from a stored dZ": _batched_from_d_z,
}
