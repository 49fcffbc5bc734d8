r"""`norm_project` in PyTorch with a hand-written backward.

.. math::
    \hat x = (x - \mu) \rho,\quad h = \hat x \odot w + b,\quad V = h M^T,\quad \ell = h W_r^T,\qquad
    \rho = 1 / \sqrt{\mathrm{mean}((x - \mu)^2) + \epsilon}

with mu the mean for a LayerNorm and 0 for an RMSNorm (whose b is 0), and N folded into A, M_k = N_k A_k. The backward
needs x, h, mu and rho. With G the whole gradient of h and c = G \odot w:

.. math::
    G = \bar h + \bar V M + \bar\ell W_r,\quad
    \bar x = \rho\,(c - \hat x\,\mathrm{mean}(c \odot \hat x) - [\text{LayerNorm}]\,\mathrm{mean}(c)),\quad
    \bar w = \sum_t G \odot \hat x,\quad \bar b = \sum_t G,\quad \bar M = \bar V^T h,\quad \bar W_r = \bar\ell^T h
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hycam_kernels.backends.norm_gradients import Parts, norm_gradients
from hycam_kernels.folding import fold_weights
from hycam_kernels.inputs import NormProjectInputs, NormSaved, NormUpstream


def forward(x: NormProjectInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h [T, d], V [T, E r], logits [T, E], and the statistics mu (0 elements for an RMSNorm) and rho [T]."""
    values = x.hidden_in.to(x.norm_dtype)
    if x.kind == "rms":
        mean = values.new_empty(0)
        rstd = torch.rsqrt(values.square().mean(-1) + x.eps)
        # rounded to the input's dtype before the weight, as transformers' Llama does
        hidden = x.norm_weight * (values * rstd[:, None]).to(x.hidden_in.dtype)
    else:
        mean = values.mean(-1)
        centred = values - mean[:, None]
        rstd = torch.rsqrt(centred.square().mean(-1) + x.eps)
        hidden = centred * rstd[:, None] * x.norm_weight.to(x.norm_dtype)
        if x.norm_bias is not None:
            hidden = hidden + x.norm_bias.to(x.norm_dtype)
        hidden = hidden.to(x.hidden_dtype)
    operand = hidden.to(x.compute_dtype)
    v = F.linear(operand, fold_weights(x.lora_n, x.lora_a, x.compute_dtype))
    logits = F.linear(operand.to(x.sum_dtype), x.router_weight.to(x.compute_dtype).to(x.sum_dtype))
    return hidden, v, logits, mean, rstd


def backward(upstream: NormUpstream, x: NormProjectInputs, saved: NormSaved, needs: list[bool]) -> list[Tensor]:
    """Gradients of the tensors in `NORM_DIFFERENTIABLE`, as `norm_gradients` returns them."""
    return norm_gradients(upstream, x, saved, needs, Parts(_hidden_gradient, _norm_backward, _router_weight_gradient))


def _hidden_gradient(upstream: NormUpstream, x: NormProjectInputs) -> Tensor | None:
    """G [T, d], the gradient of h through all three results; None where none of them has one."""
    gradient = upstream.hidden
    if upstream.v is not None:
        gradient = _add_product(gradient, upstream.v, fold_weights(x.lora_n, x.lora_a, x.compute_dtype))
    if upstream.logits is not None:
        gradient = _add_product(gradient, upstream.logits.to(x.compute_dtype), x.router_weight.to(x.compute_dtype))
    return gradient


def _add_product(to: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    if to is None:
        return a @ b
    return torch.addmm(to, a, b) if to.dtype == a.dtype else to + a @ b


def _norm_backward(
    gradient: Tensor, x: NormProjectInputs, saved: NormSaved, need: dict[str, bool]
) -> dict[str, Tensor]:
    grads = {}
    gradient = gradient.to(x.norm_dtype)
    rstd = saved.rstd[:, None]
    values = x.hidden_in.to(x.norm_dtype)
    centred = values if x.kind == "rms" else values - saved.mean[:, None]
    normalised = centred * rstd
    if need["norm_weight"]:
        grads["norm_weight"] = (gradient * normalised).sum(0)
    if need["norm_bias"]:
        grads["norm_bias"] = gradient.sum(0)
    if need["hidden_in"]:
        weighted = gradient * x.norm_weight.to(x.norm_dtype)
        inner = weighted - normalised * (weighted * normalised).mean(-1, keepdim=True)
        if x.kind == "layer":
            inner = inner - weighted.mean(-1, keepdim=True)
        grads["hidden_in"] = inner * rstd
    return grads


def _router_weight_gradient(grad_logits: Tensor, operand: Tensor, x: NormProjectInputs) -> Tensor:
    # a token's share of the balance loss is below float16's smallest number
    return grad_logits.T @ operand.to(x.sum_dtype)
