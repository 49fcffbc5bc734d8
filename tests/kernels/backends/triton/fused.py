"""The fused backend for `tests.kernels.cases`, whose tensors are on the CPU, and the cases that cover its branches."""

import torch
from torch import Tensor

from hycam_kernels import HyCAMOutput, hycam_modulation
from hycam_kernels.backends.triton import modulation as triton_backend
from hycam_kernels.inputs import DIFFERENTIABLE
from hycam_kernels.preparation import prepare
from tests.kernels.backends.triton.guards import GuardedAllocations, Guards
from tests.kernels.cases import Case, packed, run

CASES = {
    "paper": Case((77,), 96, 3, 16, options={"seed": 3}),
    "evaluation": Case((5, 15), 80, 3, 16),
    "one-token": Case((1,), 200, 1, 4, options={"seed": 3}),
    "no-leading-dimension": Case((), 96, 3, 4, options={"seed": 3}),
    "many-experts": Case((130,), 80, 8, 4, biases=True, masked=True, options={"seed": 3, "tau": 2.5}),
    "sixteen-experts": Case((17,), 80, 16, 4, options={"seed": 3}),
    "rank-64": Case((130,), 200, 3, 64, options={"seed": 3}),
    "rank-over-a-block": Case((33,), 80, 2, 144, biases=True, residual=True, options={"seed": 3}),
    "most-experts-of-rank-1": Case((9,), 33, 16, 1, options={"seed": 3}),
    "rank-256": Case((9,), 48, 1, 256),
    "masked": Case((77,), 80, 3, 4, masked=True, options={"seed": 3}),
    "hard": Case((77,), 80, 3, 16, masked=True, options={"seed": 3, "hard": True}),
    "released": Case((77,), 96, 5, 16, biases=True, residual=True, options={"seed": 3, "hard": True, "scale": 8.0}),
    "residual": Case((77,), 80, 1, 16, residual=True, options={"scale": 2.0}),
    "experts-only": Case((77,), 80, 3, 16, shared=False, biases=True, options={"seed": 3}),
    "projected": Case((77,), 80, 3, 16, experts="projected", residual=True, masked=True, options={"seed": 3}),
    "shared-only": Case((77,), 96, experts=None, biases=True, residual=True),
    "no-branch": Case((7,), 80, shared=False, experts=None),
}


def run_fused(arguments: dict, device: torch.device, **options) -> dict[str, Tensor]:
    """`run` of the triton backend on ``device``, results on the CPU."""

    def to_device(value):
        if isinstance(value, tuple):
            return tuple(map(to_device, value))
        return value.to(device) if isinstance(value, Tensor) else value

    def on_device(**arguments) -> HyCAMOutput:
        moved = {name: to_device(value) for name, value in arguments.items()}
        return HyCAMOutput(*(part.cpu() for part in hycam_modulation(**moved, backend="triton")))

    return run(on_device, arguments, **options)


def assert_touches_only_its_own_memory(case: Case, dtype: torch.dtype, device: torch.device, **options) -> None:
    """Inputs with poisoned gaps between rows, outputs poisoned before: right values, and every gap as it was."""
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.make(dtype).items()}

    def both_passes(arguments: dict, grads: list[Tensor | None]) -> list[Tensor]:
        x = prepare(**packed(arguments), **options, backend="triton")
        needs = [getattr(x, field) is not None for field in DIFFERENTIABLE]
        out, load, router_prob, saved = triton_backend.forward(x)
        return [out, load, router_prob, *saved, *triton_backend.backward(*grads, x, saved, needs)]

    count = case.num_experts if case.experts else 0
    grads = [
        torch.randn(*case.leading, case.d, device=device).to(dtype),
        *(torch.randn(count, device=device) for _ in range(2)),
    ]
    guards = Guards()
    rows = ("hidden", "attn_output", "residual")
    guarded = {
        name: guards.copy(value, gap=24 if name in rows else 0).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }
    guarded_grads = [guards.copy(grads[0], gap=8), *(guards.copy(grad) for grad in grads[1:])]
    # oneDNN's bfloat16 products read past a row's end where d isn't a multiple of 32
    with torch.backends.mkldnn.flags(enabled=False):
        with GuardedAllocations(guards) as allocations:
            got = both_passes(guarded, guarded_grads)
        assert allocations.count > 3
        guards.check()
        want = both_passes(arguments, grads)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.isfinite().all(), index
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
