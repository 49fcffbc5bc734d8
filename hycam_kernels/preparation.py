"""From the arguments of `hycam_modulation` to what a backend receives: checked, tokens flattened, dtype chosen."""

import torch
from torch import Tensor

from hycam_kernels.checks import check_arguments, split_projections
from hycam_kernels.inputs import ModulationInputs
from hycam_kernels.philox import as_seed_tensor


def prepare(
    hidden, attn_output, shared_weight, lora_a, lora_n, lora_b, router_weight, *,
    tau=0.5, gumbel=None, seed=None, hard=False, token_mask=None, scale=1.0,
    shared_bias=None, lora_a_bias=None, lora_n_bias=None, lora_b_bias=None, router_bias=None,
    expert_weight=None, recompute=False, residual=None, projections=None, backend="auto",
    training=False, fitting=False,
) -> ModulationInputs:  # fmt: skip
    """Check the arguments of `hycam_modulation`, unless they're known to be ``fitting``, and flatten the tokens;
    ``training`` is that of `modulate`."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError("hycam_modulation: transforms of torch.func are not supported; use torch.autograd")
    v, logits = (None, None) if projections is None else split_projections(projections)
    streams = hidden, attn_output, residual, v, logits
    weights = (
        shared_weight, lora_a, lora_n, lora_b, router_weight,
        shared_bias, lora_a_bias, lora_n_bias, lora_b_bias, router_bias, expert_weight,
    )  # fmt: skip
    if not fitting:
        check_arguments(
            (*streams, gumbel, *weights), tau=tau, seed=seed, scale=scale, token_mask=token_mask, backend=backend
        )
    carries_grad = _any_requires_grad(streams)
    needs_grad = torch.is_grad_enabled() and (carries_grad or _any_requires_grad((*weights, gumbel)))
    dtype = compute_dtype(hidden.dtype, hidden.device)
    return ModulationInputs(
        _rows(hidden),
        _rows(attn_output),
        *weights,
        None if residual is None else _rows(residual),
        None if v is None else v.reshape(-1, v.shape[-2] * v.shape[-1]).to(dtype).contiguous(),
        None if logits is None else _rows(logits).to(torch.promote_types(dtype, torch.float32)).contiguous(),
        None if gumbel is None else _rows(gumbel.detach()),
        None if seed is None else as_seed_tensor(seed),
        token_mask if token_mask is None or token_mask.ndim == 1 else token_mask.reshape(-1),
        float(tau),
        bool(hard),
        float(scale),
        dtype,
        keep=needs_grad and not recompute,
        needs_grad=needs_grad,
        backend=backend,
        # With grad mode on, frozen weights give the bits of trained ones. With it off, an input still carries a
        # gradient where a checkpoint's first forward begins.
        inference=not (torch.is_grad_enabled() or carries_grad or training),
    )


def _any_requires_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _rows(tensor: Tensor) -> Tensor:
    """[..., n] as [T, n]."""
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """dtype of the matrix products for a hidden of ``dtype``: autocast's where it is on (float64 stays), else dtype."""
    if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype
