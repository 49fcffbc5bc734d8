r"""Backward of the fusion, from the upstream gradient G of h_out; x is the stream that A_fusion multiplies.

With F = G \odot x, the gradient of A_fusion, and Z_k = s (V_k B_k^T + b_k), which every kernel makes again:

.. math::
    \bar h_{in} &= G \odot A_{fusion},\quad \bar h_{att} = G + \bar h_{in},\quad
        \bar S = F \odot \mathrm{SiLU}'(S),\quad
        \bar p_k = \langle F, \mathrm{SiLU}(Z_k) \rangle_{row} && \text{stream\_grad\_kernel} \\
    D_k &= s\,p_k\, F \odot \mathrm{SiLU}'(Z_k),\quad \bar V_k = D_k B_k && \text{v\_grad\_kernel} \\
    \bar B_k &= D_k^T V_k,\quad \bar b_k = \textstyle\sum_t D_{kt} && \text{b\_grad\_kernel}

`row_grad_kernel` makes the first two in one pass, with Z_k once instead of twice; the table of the GPU family says for
which calls (it keeps every expert's sums in registers). Sums that cross programs (p over column blocks or splits of d,
V over splits of d, B over splits of T) are partial sums in float32, added in a fixed order: no atomics.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from hycam_kernels.backends.triton.config_tables import Config
from hycam_kernels.backends.triton.kernels.cost import Cost
from hycam_kernels.backends.triton.kernels.fusion_backward_kernels import (
    b_grad_kernel,
    row_grad_kernel,
    stream_grad_kernel,
    v_grad_kernel,
)
from hycam_kernels.backends.triton.launch import SPLIT_BY, Launcher, add_parts, row_stride, split
from hycam_kernels.inputs import ModulationInputs


class FusionBackward:
    """Launches the backward kernels of one call; grad_out [T, d], the other tensors as the forward had them."""

    def __init__(
        self,
        launch: Launcher,
        x: ModulationInputs,
        grad_out: Tensor,
        s: Tensor | None,
        v: Tensor | None,
        lora_b: Tensor | None,
        weights: Tensor,
    ) -> None:
        self.launch = launch
        self.x = x
        self.s = s
        self.arguments = launch.fusion_arguments(x, v, lora_b, weights) | {
            "grad_out": grad_out,
            "stride_grad": row_stride(grad_out),
        }

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.hidden.device)

    def stream(
        self, *, attn: bool, residual: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of h_att and h_in [T, d] where asked for, of S [T, d], and of p [splits of d, T, E] in parts."""
        x = self.x
        tokens, d = x.hidden.shape
        config = self.launch.config("stream_grad", x)
        row_blocks = triton.cdiv(tokens, config["BLOCK_T"])
        resident = bool(config.keys() & SPLIT_BY)
        columns, splits = split(config, row_blocks, d, config["BLOCK_D"])
        stream = self._stream_arguments(attn, residual)
        partial_d_probs = self._empty(splits, tokens, x.num_experts) if x.num_experts else None
        self.launch(
            stream_grad_kernel,
            (row_blocks * splits,),
            config,
            columns=columns,
            RESIDENT=resident,
            partial_d_probs=partial_d_probs,
            **stream,
            **self.arguments,
        )
        return stream["d_attn"], stream["d_residual"], stream["d_s"], partial_d_probs

    def stream_and_v(
        self, *, attn: bool, residual: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
        """What `stream` and `v` give, by one kernel."""
        x = self.x
        tokens, d = x.hidden.shape
        config = self.launch.config("row_grad", x)
        row_blocks = triton.cdiv(tokens, config["BLOCK_T"])
        columns, splits = split(config, row_blocks, d, config["BLOCK_D"])
        stream = self._stream_arguments(attn, residual)
        partial_d_probs = self._empty(splits, tokens, x.num_experts)
        partial_d_v = self._empty(splits, tokens, x.num_experts * x.rank)
        self.launch(
            row_grad_kernel,
            (row_blocks, splits),
            config,
            partial_d_probs=partial_d_probs,
            partial_d_v=partial_d_v,
            columns=columns,
            **stream,
            **self.arguments,
        )
        return stream["d_attn"], stream["d_residual"], stream["d_s"], partial_d_probs, partial_d_v

    def _stream_arguments(self, attn: bool, residual: bool) -> dict[str, Any]:
        """What the kernels take that make the gradients of h_att, h_in and S: S, and these as far as they are asked."""
        x, shape = self.x, self.x.hidden.shape
        return {
            "s": self.s,
            "stride_s": row_stride(self.s),
            "d_attn": self._empty(*shape, dtype=x.attn_output.dtype) if attn else None,
            "d_residual": self._empty(*shape, dtype=x.residual.dtype) if residual and x.residual is not None else None,
            "d_s": None if self.s is None else self._empty(*shape, dtype=x.compute_dtype),
        }

    def v(self) -> Tensor:
        """Gradient of V in parts, [splits of d, T, E r]."""
        x = self.x
        tokens, d = x.hidden.shape
        config = self.launch.config("v_grad", x)
        programs = triton.cdiv(tokens, config["BLOCK_T"]) * self._groups(config)
        columns, splits = split(config, programs, d, config["BLOCK_D"])
        partial_d_v = self._empty(splits, tokens, x.num_experts * x.rank)
        self.launch(
            v_grad_kernel, (programs, splits), config, partial_d_v=partial_d_v, columns=columns, **self.arguments
        )
        return partial_d_v

    def _groups(self, config: Config) -> int:
        """Of experts, times the blocks of their rank; EXPERTS become as even as their groups allow."""
        groups = triton.cdiv(self.x.num_experts, config["EXPERTS"])
        config["EXPERTS"] = triton.cdiv(self.x.num_experts, groups)
        return groups * triton.cdiv(self.x.rank, config["BLOCK_R"])

    def b(self) -> tuple[Tensor, Tensor | None]:
        """Gradients of B in parts, [splits of T, E, d, r], and, where there is one, of its bias [E, d] in float32."""
        x = self.x
        tokens, d = x.hidden.shape
        config = self.launch.config("b_grad", x)
        programs = triton.cdiv(d, config["BLOCK_D"]) * self._groups(config)
        tokens_per_split, splits = split(config, programs, tokens, config["BLOCK_T"])
        partial_d_b = self._empty(splits, x.num_experts, d, x.rank)
        partial_d_bias = None if x.lora_b_bias is None else self._empty(splits, x.num_experts, d)
        self.launch(
            b_grad_kernel,
            (programs, splits),
            config,
            partial_d_b=partial_d_b,
            partial_d_bias=partial_d_bias,
            tokens_per_split=tokens_per_split,
            **self.arguments,
        )
        return partial_d_b, None if partial_d_bias is None else add_parts(partial_d_bias)


def fusion_backward_reference(
    grad_out: Tensor,
    s: Tensor | None,
    v: Tensor | None,
    lora_b: Tensor | None,
    lora_b_bias: Tensor | None,
    weights: Tensor,
    attn_output: Tensor,
    residual: Tensor | None,
    scale: float,
) -> dict[str, Tensor]:
    """The equations above on tensors of one dtype; ``weights`` [T, E] are the p that are used."""
    d_fusion = grad_out * (attn_output if residual is None else attn_output + residual)
    fusion = torch.zeros_like(grad_out)
    grads = {}
    if s is not None:
        fusion = F.silu(s)
        grads["s"] = torch.ops.aten.silu_backward(d_fusion, s)
    if v is not None and lora_b is not None:
        v = v.unflatten(1, (lora_b.shape[0], -1))
        z = torch.einsum("ter,edr->ted", v, lora_b)
        z = scale * (z if lora_b_bias is None else z + lora_b_bias)
        fusion = fusion + torch.einsum("te,ted->td", weights, F.silu(z))
        d_k = scale * weights[..., None] * torch.ops.aten.silu_backward(d_fusion[:, None].expand_as(z), z)
        grads["probs"] = (d_fusion[:, None] * F.silu(z)).sum(-1)
        grads["v"] = torch.einsum("ted,edr->ter", d_k, lora_b).flatten(1)
        grads["lora_b"] = torch.einsum("ted,ter->edr", d_k, v)
        grads["lora_b_bias"] = d_k.sum(0)
    grads["residual"] = grad_out * fusion
    grads["attn_output"] = grad_out + grads["residual"]
    return grads


def stream_grad_cost(tokens: int, d: int, num_experts: int, rank: int, *, residual=False, itemsize=2) -> Cost:
    """Reads G, h_att (h_in), S, V, B and p; writes the gradients of h_att (h_in) and S, and of p."""
    activations = (5 + 2 * residual) * tokens * d + tokens * num_experts * rank
    return Cost(
        itemsize * (activations + num_experts * d * rank) + 8 * tokens * num_experts,
        2 * tokens * d * num_experts * rank,
        (1 + num_experts) * tokens * d,
    )


def row_grad_cost(tokens: int, d: int, num_experts: int, rank: int, *, residual=False, itemsize=2) -> Cost:
    """What `stream_grad_cost` and `v_grad_cost` count, with G, h_att (h_in), V, B and p read, and Z made, once."""
    stream = stream_grad_cost(tokens, d, num_experts, rank, residual=residual, itemsize=itemsize)
    products = tokens * num_experts * rank
    return Cost(stream.bytes + 4 * products, 4 * d * products, stream.sigmoids)


def v_grad_cost(tokens: int, d: int, num_experts: int, rank: int, *, residual=False, itemsize=2) -> Cost:
    """Reads G, h_att (h_in), V, B and p, writes V's gradient in float32; Z again and one more product."""
    products = tokens * num_experts * rank
    activations = (2 + residual) * tokens * d + products
    return Cost(
        itemsize * (activations + num_experts * d * rank) + 4 * (tokens * num_experts + products),
        4 * d * products,
        num_experts * tokens * d,
    )


def b_grad_cost(tokens: int, d: int, num_experts: int, rank: int, *, residual=False, itemsize=2) -> Cost:
    """Reads what `v_grad_cost` reads, writes B's gradient in float32."""
    weight = num_experts * d * rank
    activations = (2 + residual) * tokens * d + tokens * num_experts * rank
    return Cost(
        itemsize * (activations + weight) + 4 * (tokens * num_experts + weight),
        4 * tokens * weight,
        num_experts * tokens * d,
    )
