"""Ways to arrange the op, to choose a structure by: its library products, and the two forms of its forward.

Library products: separate or joined, and two batched ones. Joined products take the weights [W_s; M] or the gradients
[dS | dV] as one matrix, ready-made: what joining itself costs (a copy of the weights, or packed storage) is not in the
times. The forward: its fusion after the library's shared product or inside our own, S kept or not.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.session import Session, describe, dtype_name
from benchmarks.harness.timing import Work, alternate
from benchmarks.op.shapes import Shape
from hycam_kernels.backends.triton import modulation as triton_backend
from hycam_kernels.backends.triton.config_tables import Table, drop_limits
from hycam_kernels.backends.triton.tuning import RowLauncher, Size, make_call
from hycam_kernels.inputs import ModulationInputs


def measure_structures(
    session: Session, shape: Shape, dtype: torch.dtype, table: Table, *, inline_assembly: bool
) -> None:
    """Times of the arrangements below at one shape, with a table's block sizes."""
    if not session.starts(4, "structure", shape):
        return
    operands = [_operands(shape, dtype, session.device) for _ in range(2)]
    products = {
        name: Work(lambda i: operands[i], partial(_apply, function), len(operands))
        for name, function in ARRANGEMENTS.items()
    }
    _time(session, shape, dtype, products)
    calls = [make_call(Size(*shape.as_dict().values()), dtype, session.device, training=True) for _ in range(2)]
    forms = {
        name: Work(lambda i: calls[i], form, len(calls))
        for name, form in forward_forms(table, inline_assembly=inline_assembly).items()
    }
    _time(session, shape, dtype, forms)


def _time(session: Session, shape: Shape, dtype: torch.dtype, works: dict[str, Work]) -> None:
    for timer in session.timers:
        samplers = {}
        for name, work in works.items():
            try:
                samplers[name] = timer.prepare(work)
            except Exception as error:  # triton has no common class for what fails; the others are still measured
                session.add("structure", shape, dtype=dtype_name(dtype), what=name, error=describe(error))
        for name, samples in alternate(samplers, session.rounds, session.budget.lasts).items():
            session.add("structure", shape, dtype=dtype_name(dtype), what=name, method=timer.method, samples_us=samples)


def forward_forms(table: Table, *, inline_assembly: bool) -> dict[str, partial[Tensor]]:
    """h_out by name of the form; a table without our own product has the library's alone."""
    kernel = "product_forward"
    tables = {"library product": {name: rows for name, rows in table.items() if name != kernel}}
    if kernel in table:
        tables["own product"] = table | {kernel: drop_limits(table[kernel], "candidate", "kept")}
    forms = {}
    for name, of_form in tables.items():
        launch = RowLauncher(of_form, inline_assembly=inline_assembly)
        for keep in (True, False):
            kept = "S kept" if keep else "S not kept"
            forms[f"forward, {name}, {kept}"] = partial(_forward, launch=launch, keep=keep)
    return forms


def _forward(x: ModulationInputs, *, launch: RowLauncher, keep: bool) -> Tensor:
    return triton_backend.forward(x._replace(keep=keep), launch)[0]


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
