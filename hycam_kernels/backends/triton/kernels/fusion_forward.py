r"""Forward fusion, one pass after the library products S = h W_s^T and V = h M^T.

.. math::
    h_{out} = h_{att} + x \odot \Big(\mathrm{SiLU}(S) + \sum_k p_k\,\mathrm{SiLU}(s\,(V_k B_k^T + b_k))\Big),
    \quad x = h_{att} \text{ or } h_{in} + h_{att}

One program makes one [BLOCK_T, BLOCK_D] tile of the output; Z_k lives in registers only.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hycam_kernels.backends.triton.kernels.cost import Cost
from hycam_kernels.backends.triton.kernels.primitives import add_experts, load_tile, sigmoid, store_modulated
from hycam_kernels.backends.triton.launch import Launcher, row_stride
from hycam_kernels.inputs import ModulationInputs


@triton.jit
def fusion_forward_kernel(
    s, v, lora_b, lora_b_bias, weights, attn_output, residual, out,
    tokens, d, stride_s, stride_v, stride_attn, stride_residual, scale,
    NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, FAST_RECIPROCAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    column_blocks = tl.cdiv(d, BLOCK_D)
    rows = tl.program_id(0) // column_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    row_mask = rows < tokens
    col_mask = cols < d

    fusion = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if s is not None:
        s_tile = load_tile(s, rows[:, None], cols[None, :], stride_s, row_mask[:, None] & col_mask[None, :])
        fusion = s_tile * sigmoid(s_tile, FAST_RECIPROCAL)
    fusion = add_experts(
        fusion, v, lora_b, lora_b_bias, weights, rows, cols, row_mask, col_mask, d, stride_v, scale,
        NUM_EXPERTS, RANK, FAST_RECIPROCAL, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
    )  # fmt: skip
    store_modulated(
        fusion, attn_output, residual, out, rows, cols, row_mask, col_mask, d, stride_attn, stride_residual
    )  # fmt: skip


def fusion_forward(
    launch: Launcher, x: ModulationInputs, s: Tensor | None, v: Tensor | None, lora_b: Tensor | None, weights: Tensor
) -> Tensor:
    """h_out [T, d] in attn_output's dtype from S [T, d], V [T, E r], contiguous B [E, d, r] and the used p [T, E]."""
    tokens, d = x.hidden.shape
    out = torch.empty(tokens, d, dtype=x.attn_output.dtype, device=x.hidden.device)
    config = launch.config("fusion_forward", x)
    launch(
        fusion_forward_kernel,
        (triton.cdiv(tokens, config["BLOCK_T"]) * triton.cdiv(d, config["BLOCK_D"]),),
        config,
        s=s,
        out=out,
        stride_s=row_stride(s),
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
