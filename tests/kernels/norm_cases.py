"""Inputs of `norm_project` for a test case, and its results with every gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hycam_kernels.reference import norm_project_reference
from tests.kernels.cases import cast_floats, leaves


@dataclass(frozen=True)
class NormCase:
    """Shapes and options of one call. ``leading`` are the token dimensions; ``offset`` is added to the input."""

    leading: tuple[int, ...] = (2, 13)
    d: int = 24
    num_experts: int = 3
    rank: int = 4
    kind: str = "rms"
    bias: bool = False
    eps: float = 1e-6
    offset: float = 0.0

    def make(self, dtype: torch.dtype, weight_dtype: torch.dtype | None = None, seed: int = 0) -> dict:
        """Random arguments of `norm_project` by name, float tensors requiring grad."""
        generator = torch.Generator().manual_seed(seed)
        weight_dtype = weight_dtype or dtype
        E, r, d = self.num_experts, self.rank, self.d

        def draw(*shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype = weight_dtype) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
            return values.to(dtype).requires_grad_()

        return {
            "hidden_in": draw(*self.leading, d, scale=3.0, shift=self.offset, dtype=dtype),
            "norm_weight": draw(d, scale=0.5, shift=1.0, dtype=dtype),
            "norm_bias": draw(d, scale=0.5, dtype=dtype) if self.bias else None,
            "lora_a": draw(E, r, d, scale=d**-0.5),
            "lora_n": draw(E, r, r, scale=r**-0.5),
            "router_weight": draw(E, d, scale=d**-0.5),
            "eps": self.eps,
            "kind": self.kind,
        }


def run_norm(function, arguments: dict, **options) -> dict[str, Tensor]:
    """The three results and every gradient of a fixed scalar of all of them."""
    output = function(**arguments, **options)
    generator = torch.Generator().manual_seed(1)
    scalar = torch.zeros((), dtype=torch.float64)
    for result in output:
        upstream = torch.randn(result.shape, generator=generator, dtype=torch.float64)
        scalar = scalar + (result * upstream.to(result.dtype)).sum().double()
    names = leaves(arguments)
    grads = torch.autograd.grad(scalar, list(names.values()))
    results = dict(zip(output._fields, output, strict=True))
    results |= {f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}
    return {name: value.detach() for name, value in results.items()}


def norm_reference_results(arguments: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results of the reference with every float tensor cast to ``dtype``."""
    return run_norm(norm_project_reference, cast_floats(arguments, dtype))
