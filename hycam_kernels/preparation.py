"""From the arguments of `hycam_modulation` to what a backend receives: checked, tokens flattened, dtype chosen."""

import torch

from hycam_kernels.checks import check_arguments, split_projections
from hycam_kernels.inputs import ModulationInputs
from hycam_kernels.philox import as_seed_tensor


def prepare(
    hidden, attn_output, shared_weight, lora_a, lora_n, lora_b, router_weight, *,
    tau=0.5, gumbel=None, seed=None, hard=False, token_mask=None, scale=1.0,
    shared_bias=None, lora_a_bias=None, lora_n_bias=None, lora_b_bias=None, router_bias=None,
    expert_weight=None, recompute=False, residual=None, projections=None, backend="auto",
) -> ModulationInputs:  # fmt: skip
    """Check the arguments of `hycam_modulation` and flatten the tokens."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError("hycam_modulation: transforms of torch.func are not supported; use torch.autograd")
    v, logits = split_projections(projections)
    tensors = {
        "hidden": hidden,
        "attn_output": attn_output,
        "shared_weight": shared_weight,
        "lora_a": lora_a,
        "lora_n": lora_n,
        "lora_b": lora_b,
        "router_weight": router_weight,
        "shared_bias": shared_bias,
        "lora_a_bias": lora_a_bias,
        "lora_n_bias": lora_n_bias,
        "lora_b_bias": lora_b_bias,
        "router_bias": router_bias,
        "expert_weight": expert_weight,
        "residual": residual,
        "gumbel": gumbel,
        "projections[0]": v,
        "projections[1]": logits,
    }
    check_arguments(tensors, tau=tau, seed=seed, scale=scale, token_mask=token_mask, backend=backend)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values())
    d = hidden.shape[-1]
    tensors["hidden"] = hidden.reshape(-1, d)
    tensors["attn_output"] = attn_output.reshape(-1, d)
    tensors["residual"] = None if residual is None else residual.reshape(-1, d)
    tensors["gumbel"] = None if gumbel is None else gumbel.detach().reshape(-1, gumbel.shape[-1])
    dtype = compute_dtype(hidden.dtype, hidden.device)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    del tensors["projections[0]"], tensors["projections[1]"]
    return ModulationInputs(
        **tensors,
        given_v=None if v is None else v.reshape(-1, v.shape[-2] * v.shape[-1]).to(dtype).contiguous(),
        given_logits=None if logits is None else logits.reshape(-1, logits.shape[-1]).to(sum_dtype).contiguous(),
        seed=None if seed is None else as_seed_tensor(seed),
        token_mask=None if token_mask is None else token_mask.reshape(-1),
        tau=float(tau),
        hard=bool(hard),
        scale=float(scale),
        compute_dtype=dtype,
        keep=needs_grad and not recompute,
        needs_grad=needs_grad,
        backend=backend,
    )


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """dtype of the matrix products for a hidden of ``dtype``: autocast's where it is on (float64 stays), else dtype."""
    if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype
