r"""Forward fusion, one pass after the library products S = h W_s^T and V = h M^T.

.. math::
    h_{out} = h_{att} + x \odot \Big(\mathrm{SiLU}(S) + \sum_k p_k\,\mathrm{SiLU}(s\,(V_k B_k^T + b_k))\Big),
    \quad x = h_{att} \text{ or } h_{in} + h_{att}

Z_k lives in registers only. A program makes one [BLOCK_T, BLOCK_D] tile of the output, for any number of experts; or
where the table says how many PROGRAMS fill the GPU, one after the other the tiles of a split of d, with every expert's
V_k in shared memory, so that it is read once.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hycam_kernels.backends.triton.kernels.cost import Cost
from hycam_kernels.backends.triton.kernels.primitives import (
    add_experts,
    load_all_v,
    load_all_weights,
    load_b,
    load_tile,
    resident_tile,
    silu,
    silu_gate,
    silu_unit,
    store_modulated,
)
from hycam_kernels.backends.triton.launch import SPLIT_BY, Launcher, row_stride, split
from hycam_kernels.inputs import ModulationInputs


@triton.jit
def fusion_forward_kernel(
    s, v, lora_b, lora_b_bias, weights, attn_output, residual, out,
    tokens, d, columns, stride_s, stride_v, stride_attn, stride_residual, scale,
    NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A token block over ``columns`` features, which are one block unless V is RESIDENT."""
    splits = tl.cdiv(d, columns)
    rows = tl.program_id(0) // splits * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(0) % splits * columns
    row_mask = rows < tokens
    if RESIDENT:
        v_tiles = load_all_v(v, rows, row_mask, stride_v, NUM_EXPERTS, RANK, BLOCK_R)
        p = load_all_weights(weights, rows, row_mask, NUM_EXPERTS)
        for start in range(first, tl.minimum(first + columns, d), BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            col_mask = cols < d
            fusion = silu_of_s(s, rows, cols, row_mask, col_mask, stride_s, SIGMOID, BLOCK_T, BLOCK_D)
            for expert in tl.static_range(NUM_EXPERTS):
                b_tile = load_b(lora_b, expert, cols, col_mask, 0, d, RANK, BLOCK_R)
                a = resident_tile(
                    v_tiles[expert], b_tile, lora_b_bias, expert, start, col_mask, d, scale * silu_unit(SIGMOID),
                    BLOCK_D, PRECISION,
                )  # fmt: skip
                fusion += p[expert][:, None] * silu(a, silu_gate(a, SIGMOID), SIGMOID)
            store_modulated(
                fusion, attn_output, residual, out, rows, cols, row_mask, col_mask, d, stride_attn, stride_residual
            )  # fmt: skip
    else:
        cols = first + tl.arange(0, BLOCK_D)
        col_mask = cols < d
        fusion = silu_of_s(s, rows, cols, row_mask, col_mask, stride_s, SIGMOID, BLOCK_T, BLOCK_D)
        fusion = add_experts(
            fusion, v, lora_b, lora_b_bias, weights, rows, cols, row_mask, col_mask, d, stride_v, scale,
            NUM_EXPERTS, RANK, SIGMOID, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
        )  # fmt: skip
        store_modulated(
            fusion, attn_output, residual, out, rows, cols, row_mask, col_mask, d, stride_attn, stride_residual
        )  # fmt: skip


@triton.jit
def silu_of_s(
    s, rows, cols, row_mask, col_mask, stride_s, SIGMOID: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """SiLU(S), or 0 without S."""
    if s is None:
        return tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    else:
        s_tile = load_tile(s, rows[:, None], cols[None, :], stride_s, row_mask[:, None] & col_mask[None, :])
        a = s_tile * silu_unit(SIGMOID)
        return silu(a, silu_gate(a, SIGMOID), SIGMOID)


def fusion_forward(
    launch: Launcher, x: ModulationInputs, s: Tensor | None, v: Tensor | None, lora_b: Tensor | None, weights: Tensor
) -> Tensor:
    """h_out [T, d] in attn_output's dtype from S [T, d], V [T, E r], contiguous B [E, d, r] and the used p [T, E]."""
    tokens, d = x.hidden.shape
    out = torch.empty(tokens, d, dtype=x.attn_output.dtype, device=x.hidden.device)
    config = launch.config("fusion_forward", x)
    row_blocks = triton.cdiv(tokens, config["BLOCK_T"])
    resident = bool(config.keys() & SPLIT_BY)
    columns, splits = split(config, row_blocks, d, config["BLOCK_D"])
    launch(
        fusion_forward_kernel,
        (row_blocks * splits,),
        config,
        s=s,
        out=out,
        stride_s=row_stride(s),
        columns=columns,
        RESIDENT=resident,
        **launch.fusion_arguments(x, v, lora_b, weights),
    )
    return out


def fusion_forward_reference(
    s: Tensor | None,
    v: Tensor | None,
    lora_b: Tensor | None,
    lora_b_bias: Tensor | None,
    weights: Tensor,
    attn_output: Tensor,
    residual: Tensor | None,
    scale: float,
) -> Tensor:
    """The equation above on [T, d] tensors of one dtype; ``weights`` [T, E] are the p that are used."""
    fusion = torch.zeros_like(attn_output) if s is None else F.silu(s)
    if v is not None and lora_b is not None:
        z = torch.einsum("ter,edr->ted", v.unflatten(1, (lora_b.shape[0], -1)), lora_b)
        if lora_b_bias is not None:
            z = z + lora_b_bias
        fusion = fusion + torch.einsum("te,ted->td", weights, F.silu(scale * z))
    return attn_output + (attn_output if residual is None else attn_output + residual) * fusion


def fusion_forward_cost(tokens: int, d: int, num_experts: int, rank: int, *, residual=False, itemsize=2) -> Cost:
    """Reads S, h_att (h_in), V, B and p; writes h_out; one product of T d E r."""
    activations = (3 + residual) * tokens * d + tokens * num_experts * rank
    return Cost(
        itemsize * (activations + num_experts * d * rank) + 4 * tokens * num_experts,
        2 * tokens * d * num_experts * rank,
        (1 + num_experts) * tokens * d,
    )
