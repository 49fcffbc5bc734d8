"""The op's arguments in the order of its schema, as every backend receives them."""

from typing import NamedTuple

import torch
from torch import Tensor


class ModulationInputs(NamedTuple):
    """Arguments of `hycam::modulation`, tokens flattened to T.

    ``compute_dtype`` is the dtype of the matrix products; ``needs_grad`` tells whether a backward may follow, ``keep``
    whether S and V are returned for it. ``inference`` is stricter than its absence: grad mode is off, and no
    backward follows a second forward either, as that of a checkpoint whose first one runs without gradients.
    """

    hidden: Tensor  # [T, d]
    attn_output: Tensor  # [T, d]
    shared_weight: Tensor | None  # [d, d]
    lora_a: Tensor | None  # [E, r, d]
    lora_n: Tensor | None  # [E, r, r]
    lora_b: Tensor | None  # [E, d, r]
    router_weight: Tensor | None  # [E, d]
    shared_bias: Tensor | None  # [d]
    lora_a_bias: Tensor | None  # [E, r]
    lora_n_bias: Tensor | None  # [E, r]
    lora_b_bias: Tensor | None  # [E, d]
    router_bias: Tensor | None  # [E]
    expert_weight: Tensor | None  # [E, d, d]
    residual: Tensor | None  # [T, d]
    given_v: Tensor | None  # [T, E * r] contiguous, in the compute dtype, in place of lora_a and lora_n, and
    given_logits: Tensor | None  # [T, E] contiguous, in the sum dtype, in place of router_weight
    gumbel: Tensor | None  # [T, E]
    seed: Tensor | None  # 0-d int64, on any device
    token_mask: Tensor | None  # [T] bool
    tau: float
    hard: bool
    scale: float
    compute_dtype: torch.dtype
    keep: bool
    needs_grad: bool
    backend: str
    inference: bool = False

    @property
    def shape(self) -> torch.Size:
        """[T, d]."""
        return self.hidden.shape

    @property
    def num_experts(self) -> int:
        if self.given_logits is not None:
            return self.given_logits.shape[1]
        return 0 if self.router_weight is None else self.router_weight.shape[0]

    @property
    def rank(self) -> int:
        """r of the low-rank experts; 0 without them."""
        return 0 if self.lora_b is None else self.lora_b.shape[2]

    @property
    def sum_dtype(self) -> torch.dtype:
        """dtype of logits, softmax and sums: float64 for float64 products, else float32."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32


# Names of the tensors that can get a gradient: the first fields, in the order in which the backward op returns them.
DIFFERENTIABLE = ModulationInputs._fields[: ModulationInputs._fields.index("gumbel")]


class Saved(NamedTuple):
    """What the forward keeps for the backward beside its inputs; absent parts have 0 elements.

    ``s`` and ``v`` are in the compute dtype, ``probs`` (the soft p, also under hard routing) and ``logits`` in the sum
    dtype. V and logits that were given are kept as inputs.
    """

    s: Tensor  # [T, d]      h W_shared^T + bias, if kept
    v: Tensor  # [T, E * r]  h (N A)^T + N a + n, if kept
    probs: Tensor  # [T, E]
    logits: Tensor  # [T, E], if made


class NormProjectInputs(NamedTuple):
    """Arguments of `hycam::norm_project`, tokens flattened to T.

    ``compute_dtype`` is the dtype of the two projections.
    """

    hidden_in: Tensor  # [T, d]
    norm_weight: Tensor  # [d]
    norm_bias: Tensor | None  # [d], kind "layer" only
    lora_a: Tensor  # [E, r, d]
    lora_n: Tensor  # [E, r, r]
    router_weight: Tensor  # [E, d]
    eps: float
    kind: str
    compute_dtype: torch.dtype
    backend: str

    @property
    def shape(self) -> torch.Size:
        """[T, d]."""
        return self.hidden_in.shape

    @property
    def num_experts(self) -> int:
        return self.lora_a.shape[0]

    @property
    def rank(self) -> int:
        return self.lora_a.shape[1]

    @property
    def hidden_dtype(self) -> torch.dtype:
        """dtype of the normalised input: that of ``weight * x``."""
        return torch.promote_types(self.hidden_in.dtype, self.norm_weight.dtype)

    @property
    def norm_dtype(self) -> torch.dtype:
        """dtype of the statistics."""
        return torch.promote_types(self.hidden_dtype, torch.float32)

    @property
    def sum_dtype(self) -> torch.dtype:
        """dtype of the logits: float64 for float64 products, else float32."""
        return torch.promote_types(self.compute_dtype, torch.float32)


# Names of the tensors that can get a gradient, as in DIFFERENTIABLE.
NORM_DIFFERENTIABLE = NormProjectInputs._fields[: NormProjectInputs._fields.index("eps")]


class NormUpstream(NamedTuple):
    """Gradients of the results of `hycam::norm_project`; None where one has none."""

    hidden: Tensor | None  # [T, d]
    v: Tensor | None  # [T, E * r]
    logits: Tensor | None  # [T, E]


class NormSaved(NamedTuple):
    """What the forward of `hycam::norm_project` keeps for the backward beside its inputs."""

    hidden: Tensor  # [T, d]  h
    mean: Tensor  # [T]  mu; 0 elements for an RMSNorm
    rstd: Tensor  # [T]  rho


def empty_gradients(x: ModulationInputs | NormProjectInputs, names: tuple[str, ...], needs: list[bool]) -> list[Tensor]:
    """Contiguous tensors like those of these names, of unset values; 0 elements where ``needs`` is false."""
    return [
        torch.empty_like(getattr(x, name), memory_format=torch.contiguous_format) if needed else x[0].new_empty(0)
        for name, needed in zip(names, needs, strict=True)
    ]


def finish(x: ModulationInputs | NormProjectInputs, name: str, grad: Tensor | None, needed: bool) -> Tensor:
    """A gradient as the backward op returns it: in its tensor's dtype, zeros where nothing reached it, and where it
    isn't needed what `empty_gradients` gives."""
    of = getattr(x, name)
    if not needed or of is None:
        return x[0].new_empty(0)
    return torch.zeros_like(of) if grad is None else grad.to(of.dtype)
