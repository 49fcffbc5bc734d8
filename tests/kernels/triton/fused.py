"""The fused backend for `tests.kernels.cases`, whose tensors are on the CPU, and the cases that cover its branches."""

import torch
from torch import Tensor

from hycam_kernels import HyCAMOutput, hycam_modulation
from tests.kernels.cases import Case, run

CASES = {
    "paper": Case((77,), 96, 3, 16, options={"seed": 3}),
    "evaluation": Case((5, 15), 80, 3, 16),
    "one-token": Case((1,), 200, 1, 4, options={"seed": 3}),
    "no-leading-dimension": Case((), 96, 3, 4, options={"seed": 3}),
    "many-experts": Case((130,), 80, 8, 4, masked=True, options={"seed": 3, "tau": 2.5}),
    "sixteen-experts": Case((17,), 80, 16, 4, options={"seed": 3}),
    "rank-64": Case((130,), 200, 3, 64, options={"seed": 3}),
    "rank-over-a-block": Case((33,), 80, 2, 144, biases=True, residual=True, options={"seed": 3}),
    "masked": Case((77,), 80, 3, 4, masked=True, options={"seed": 3}),
    "hard": Case((77,), 80, 3, 16, masked=True, options={"seed": 3, "hard": True}),
    "released": Case((77,), 96, 5, 16, biases=True, residual=True, options={"seed": 3, "hard": True, "scale": 8.0}),
    "residual": Case((77,), 80, 1, 16, residual=True, options={"scale": 2.0}),
    "experts-only": Case((77,), 80, 3, 16, shared=False, biases=True, options={"seed": 3}),
    "shared-only": Case((77,), 96, experts=None, biases=True, residual=True),
    "no-branch": Case((7,), 80, shared=False, experts=None),
}


def run_fused(arguments: dict, device: torch.device, **options) -> dict[str, Tensor]:
    """`run` of the triton backend on ``device``, results on the CPU."""

    def on_device(**arguments) -> HyCAMOutput:
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
        return HyCAMOutput(*(part.cpu() for part in hycam_modulation(**moved, backend="triton")))

    return run(on_device, arguments, **options)
