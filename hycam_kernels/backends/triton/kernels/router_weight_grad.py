r"""Gradient of the router's weight, W_r-bar = l-bar^T h, in float32 from the logits' gradient l-bar as it is.

A library product would round l-bar to h's dtype, and a token's share of the balance loss is below float16's smallest
number. Splits of the tokens make parts of it: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hycam_kernels.backends.triton.kernels.cost import Cost
from hycam_kernels.backends.triton.launch import Launcher, padded_experts, row_stride, split_length
from hycam_kernels.inputs import ModulationInputs, NormProjectInputs


@triton.jit
def router_weight_grad_kernel(
    hidden, d_logits, partial_d_weight,
    tokens, d, tokens_per_split, stride_hidden,
    NUM_EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    experts = tl.arange(0, PADDED_EXPERTS)
    col_mask = (cols < d)[None, :]
    expert_mask = experts < NUM_EXPERTS
    end = tl.minimum((split + 1) * tokens_per_split, tokens)

    d_weight = tl.zeros((PADDED_EXPERTS, BLOCK_D), tl.float32)
    for start in range(split * tokens_per_split, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        wide_rows = rows.to(tl.int64)[:, None]
        mask = (rows < end)[:, None] & expert_mask[None, :]
        d_logit = tl.load(d_logits + wide_rows * NUM_EXPERTS + experts[None, :], mask=mask, other=0.0)
        # a token without a gradient isn't read: it may hold NaN
        has_gradient = tl.sum((d_logit != 0).to(tl.int32), 1) > 0
        h = tl.load(
            hidden + wide_rows * stride_hidden + cols[None, :], mask=has_gradient[:, None] & col_mask, other=0.0
        )
        if PRECISION == "bf16x3":
            high = d_logit.to(tl.bfloat16)
            rest = d_logit - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            d_weight = tl.dot(tl.trans(high), h, d_weight)
            d_weight = tl.dot(tl.trans(middle), h, d_weight)
            d_weight = tl.dot(tl.trans(low), h, d_weight)
        else:
            d_weight = tl.dot(tl.trans(d_logit), h.to(tl.float32), d_weight, input_precision=PRECISION)
    partial = partial_d_weight + (split * NUM_EXPERTS + experts).to(tl.int64)[:, None] * d + cols[None, :]
    tl.store(partial, d_weight, mask=expert_mask[:, None] & col_mask)


def router_weight_grad(
    launch: Launcher,
    x: ModulationInputs | NormProjectInputs,
    d_logits: Tensor,
    hidden: Tensor,
) -> Tensor:
    """Gradient of W_r in parts, [splits of T, E, d], from that of the logits [T, E] and h [T, d] in the compute dtype.

    In float32 up to the last bits: the logits' gradient is the sum of three bfloat16 numbers where h has that dtype;
    float16 h is exact in tf32, the gradient in the sum of two tf32 numbers.
    """
    tokens, d = hidden.shape
    config = launch.config("router_weight_grad", x)
    tokens_per_split, splits = split_length(tokens, config.pop("SPLITS"), config["BLOCK_T"])
    partial_d_weight = torch.empty(splits, x.num_experts, d, dtype=torch.float32, device=hidden.device)
    precision = launch.arithmetic(x)["PRECISION"]
    if x.compute_dtype == torch.bfloat16:
        precision = "bf16x3"
    elif x.compute_dtype == torch.float16 and launch.has_tf32:
        precision = "tf32x3"
    launch(
        router_weight_grad_kernel,
        (triton.cdiv(d, config["BLOCK_D"]), splits),
        config,
        hidden=hidden,
        d_logits=d_logits.to(torch.float32).contiguous(),
        partial_d_weight=partial_d_weight,
        tokens=tokens,
        d=d,
        tokens_per_split=tokens_per_split,
        stride_hidden=row_stride(hidden),
        NUM_EXPERTS=x.num_experts,
        PADDED_EXPERTS=padded_experts(x.num_experts),
        PRECISION=precision,
    )
    return partial_d_weight


def router_weight_grad_cost(tokens: int, d: int, num_experts: int, *, itemsize=2) -> Cost:
    """Reads h and the logits' gradient once, writes W_r's in float32; a product of T d E."""
    return Cost(itemsize * tokens * d + 4 * num_experts * (tokens + d), 2 * tokens * d * num_experts)
