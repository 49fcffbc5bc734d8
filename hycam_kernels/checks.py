"""Argument checks of the ops: each error names the argument, what was given and what is wanted.

Types are told apart by tuples of them: a union is beyond torch.compile before torch 2.11.
"""

import functools
import math
from collections.abc import Mapping
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from hycam_kernels.philox import check_seed

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "torch", "triton")
NORM_KINDS = ("rms", "layer")
_PROJECTED_BIASES = ("lora_a_bias", "lora_n_bias", "router_bias")
# float32 holds logits up to 1e8 divided by it
MIN_TAU = 1e-30


_PLAIN_TENSORS = {Tensor, Parameter, NoneType}
_PLAIN_OPTIONS = {float, int, str}


class _Described(NamedTuple):
    """What the checks read of a tensor."""

    dtype: torch.dtype
    shape: torch.Size
    device: torch.device

    @property
    def ndim(self) -> int:
        return len(self.shape)


# float tensor arguments by name, None where absent
_Tensors = Mapping[str, Tensor | _Described | None]


# the float tensor arguments, in the order in which `check_arguments` takes them
_NAMES = (
    "hidden", "attn_output", "residual", "projections[0]", "projections[1]", "gumbel",
    "shared_weight", "lora_a", "lora_n", "lora_b", "router_weight",
    "shared_bias", "lora_a_bias", "lora_n_bias", "lora_b_bias", "router_bias", "expert_weight",
)  # fmt: skip


def check_arguments(
    tensors: tuple[Tensor | None, ...],
    *,
    tau: float,
    seed: int | Tensor | None,
    scale: float,
    token_mask: Tensor | None,
    backend: str,
) -> None:
    """Raise ValueError or TypeError for arguments outside the op's contract.

    Generation makes the same call for every token of every layer: what has passed is known again by the dtypes, shapes,
    devices and options that the checks read.

    Args:
        tensors: every float tensor argument in the order of `_NAMES`, None where absent.
        tau, seed, scale, token_mask, backend: as given.
    """
    if seed is not None:
        check_seed(seed, "hycam_modulation")
    seed_device = seed.device if isinstance(seed, Tensor) else None
    options = tau, scale, backend, seed is not None, seed_device
    if _is_plain((*tensors, token_mask), (tau, scale, backend)):
        _check_described(tuple([_read(tensor) for tensor in tensors]), _read(token_mask), *options)
    else:
        _check(dict(zip(_NAMES, tensors, strict=True)), token_mask, *options)


def _is_plain(tensors: tuple[object, ...], options: tuple[object, ...]) -> bool:
    """Whether what the checks read can be a key: no subclass, no symbolic number, nothing that a tracer looks at."""
    return (
        not torch.compiler.is_compiling()
        and _PLAIN_TENSORS.issuperset(map(type, tensors))
        and _PLAIN_OPTIONS.issuperset(map(type, options))
    )


_Read = tuple[torch.dtype, torch.Size, torch.device] | None


def _read(tensor: Tensor | None) -> _Read:
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.device)


# an error isn't kept: the call that raised it raises it again
@functools.lru_cache(maxsize=1024)
def _check_described(tensors: tuple[_Read, ...], token_mask: _Read, *options) -> None:
    *described, mask = (None if read is None else _Described(*read) for read in (*tensors, token_mask))
    _check(dict(zip(_NAMES, described, strict=True)), mask, *options)


def _check(
    tensors: _Tensors,
    token_mask: Tensor | _Described | None,
    tau: float,
    scale: float,
    backend: str,
    has_seed: bool,
    seed_device: torch.device | None,
) -> None:
    for name in ("hidden", "attn_output"):
        if tensors[name] is None:
            raise TypeError(f"hycam_modulation: {name} must be a tensor [..., d], got None")
    _check_types(tensors, token_mask)
    _check_presence(tensors)
    _check_shapes(tensors, token_mask)
    _check_devices(tensors, token_mask, seed_device)
    _check_options(tensors, tau, scale, backend, has_seed)


def split_projections(projections: object) -> tuple[Tensor | None, Tensor | None]:
    """V and the logits of the argument ``projections``; None and None where there is none."""
    if projections is None:
        return None, None
    if not isinstance(projections, (tuple, list)) or len(projections) != 2:
        raise TypeError(
            "hycam_modulation: projections must be a pair of tensors, V [..., E, r] and logits [..., E], got "
            f"{type(projections).__name__}"
        )
    v, logits = projections
    for index, part in enumerate(projections):
        if not isinstance(part, Tensor):
            raise TypeError(f"hycam_modulation: projections[{index}] must be a tensor, got {type(part).__name__}")
    return v, logits


def check_norm_arguments(tensors: dict[str, Tensor | None], *, eps: float, kind: str, backend: str) -> None:
    """Raise ValueError or TypeError for arguments outside the contract of `norm_project`."""
    for name, tensor in tensors.items():
        if tensor is None and name != "norm_bias":
            raise TypeError(f"norm_project: {name} must be a tensor, got None")
    _check_floats("norm_project", tensors)
    hidden, router, lora_a = tensors["hidden_in"], tensors["router_weight"], tensors["lora_a"]
    assert hidden is not None and router is not None and lora_a is not None
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"norm_project: hidden_in must be [..., d] with d >= 1, got shape {tuple(hidden.shape)}")
    d = hidden.shape[-1]
    if lora_a.ndim != 3 or 0 in lora_a.shape[:2]:
        raise ValueError(
            f"norm_project: lora_a must be [E, r, d] with E >= 1 and r >= 1, got shape {tuple(lora_a.shape)}"
        )
    num_experts, rank = lora_a.shape[:2]
    wanted = {
        "norm_weight": (d,),
        "norm_bias": (d,),
        "lora_a": (num_experts, rank, d),
        "lora_n": (num_experts, rank, rank),
        "router_weight": (num_experts, d),
    }
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"norm_project: {name} must have shape {shape} for hidden_in {tuple(hidden.shape)} and lora_a "
                f"{tuple(lora_a.shape)}, got {tuple(tensor.shape)}"
            )
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"norm_project: {name} must be on hidden_in's device {hidden.device}, got {tensor.device}")
    if kind not in NORM_KINDS:
        raise ValueError(f"norm_project: kind must be one of {', '.join(NORM_KINDS)}, got {kind!r}")
    if kind == "rms" and tensors["norm_bias"] is not None:
        raise ValueError("norm_project: norm_bias must be None with kind='rms': an RMSNorm has no bias")
    if not (0 <= eps < math.inf):
        raise ValueError(f"norm_project: eps must be 0 or more and finite, got {eps}")
    _check_backend("norm_project", backend)


def _check_floats(op: str, tensors: _Tensors) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, (Tensor, _Described)):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")


def _check_backend(op: str, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def _check_types(tensors: _Tensors, token_mask: Tensor | _Described | None) -> None:
    _check_floats("hycam_modulation", tensors)
    if token_mask is not None and not isinstance(token_mask, (Tensor, _Described)):
        raise TypeError(f"hycam_modulation: token_mask must be a bool tensor, got {type(token_mask).__name__}")
    if token_mask is not None and token_mask.dtype != torch.bool:
        raise TypeError(f"hycam_modulation: token_mask must be a bool tensor, got {token_mask.dtype}")


def _check_presence(tensors: _Tensors) -> None:
    def given(*names: str) -> list[str]:
        return [name for name in names if tensors[name] is not None]

    low_rank = ("lora_a", "lora_n", "lora_b")
    if given("projections[0]"):
        wanted: tuple[str, ...] = ("projections[0]", "projections[1]", "lora_b")
        unwanted = given("lora_a", "lora_n", "router_weight", *_PROJECTED_BIASES, "expert_weight")
        why = "projections hold what lora_a, lora_n, router_weight and their biases make"
    elif given("expert_weight"):
        wanted = ("expert_weight", "router_weight")
        unwanted = given(*low_rank, "lora_a_bias", "lora_n_bias")
        why = "expert_weight holds full-rank experts in place of lora_a, lora_n and lora_b"
    elif given(*low_rank, "router_weight"):
        wanted, unwanted, why = (*low_rank, "router_weight"), [], ""
    else:
        wanted = ()
        unwanted = given("lora_a_bias", "lora_n_bias", "lora_b_bias", "router_bias", "gumbel")
        why = "there are no experts"
    missing = [name for name in wanted if tensors[name] is None]
    if missing:
        raise ValueError(
            f"hycam_modulation: experts are given in part: {', '.join(given(*wanted))} without {', '.join(missing)}; "
            f"give {', '.join(wanted)} together, or none of them"
        )
    if unwanted:
        raise ValueError(f"hycam_modulation: {unwanted[0]} must be None: {why}")
    if tensors["shared_bias"] is not None and tensors["shared_weight"] is None:
        raise ValueError("hycam_modulation: shared_bias must be None: there is no shared_weight")


def _check_shapes(tensors: _Tensors, token_mask: Tensor | _Described | None) -> None:
    hidden = tensors["hidden"]
    assert hidden is not None
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hycam_modulation: hidden must be [..., d] with d >= 1, got shape {tuple(hidden.shape)}")
    leading, d = tuple(hidden.shape[:-1]), hidden.shape[-1]
    router, lora_a, lora_b = tensors["router_weight"], tensors["lora_a"], tensors["lora_b"]
    num_experts = rank = 0
    if tensors["projections[0]"] is not None:
        assert lora_b is not None
        if lora_b.ndim != 3 or 0 in lora_b.shape:
            raise ValueError(
                f"hycam_modulation: lora_b must be [E, d, r] with E >= 1 and r >= 1, got shape {tuple(lora_b.shape)}"
            )
        num_experts, _, rank = lora_b.shape
    if router is not None:
        if router.ndim != 2 or router.shape[0] == 0:
            raise ValueError(
                f"hycam_modulation: router_weight must be [E, d] with E >= 1, got shape {tuple(router.shape)}"
            )
        num_experts = router.shape[0]
    if lora_a is not None:
        if lora_a.ndim != 3 or lora_a.shape[1] == 0:
            raise ValueError(f"hycam_modulation: lora_a must be [E, r, d] with r >= 1, got shape {tuple(lora_a.shape)}")
        rank = lora_a.shape[1]
    wanted = {
        "attn_output": (*leading, d),
        "residual": (*leading, d),
        "gumbel": (*leading, num_experts),
        "shared_weight": (d, d),
        "shared_bias": (d,),
        "lora_a": (num_experts, rank, d),
        "lora_a_bias": (num_experts, rank),
        "lora_n": (num_experts, rank, rank),
        "lora_n_bias": (num_experts, rank),
        "lora_b": (num_experts, d, rank),
        "lora_b_bias": (num_experts, d),
        "router_weight": (num_experts, d),
        "router_bias": (num_experts,),
        "expert_weight": (num_experts, d, d),
        "projections[0]": (*leading, num_experts, rank),
        "projections[1]": (*leading, num_experts),
    }
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"hycam_modulation: {name} must have shape {shape} for hidden {tuple(hidden.shape)}, "
                f"{num_experts} experts and rank {rank}, got {tuple(tensor.shape)}"
            )
    if token_mask is not None and tuple(token_mask.shape) != leading:
        raise ValueError(
            f"hycam_modulation: token_mask must have hidden's leading shape {leading}, got {tuple(token_mask.shape)}"
        )


def _check_devices(tensors: _Tensors, token_mask: Tensor | _Described | None, seed_device: torch.device | None) -> None:
    hidden = tensors["hidden"]
    assert hidden is not None
    for name, tensor in {**tensors, "token_mask": token_mask}.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"hycam_modulation: {name} must be on hidden's device {hidden.device}, got {tensor.device}"
            )
    # a 0-d CPU tensor can seed a kernel on any device
    if seed_device is not None and seed_device != hidden.device and seed_device.type != "cpu":
        raise ValueError(
            f"hycam_modulation: seed must be on hidden's device {hidden.device} or on the CPU, got {seed_device}"
        )


def _check_options(tensors: _Tensors, tau: float, scale: float, backend: str, has_seed: bool) -> None:
    for name, value in (("tau", tau), ("scale", scale)):
        # torch.compile may hold a number symbolically
        if isinstance(value, bool) or not isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"hycam_modulation: {name} must be a float, got {type(value).__name__}")
    if not (MIN_TAU <= tau < math.inf):
        raise ValueError(f"hycam_modulation: tau must be above 0, at least {MIN_TAU}, and finite, got {tau}")
    # a comparison, not math.isfinite, for a symbolic scale
    if not (-math.inf < scale < math.inf):
        raise ValueError(f"hycam_modulation: scale must be finite, got {scale}")
    _check_backend("hycam_modulation", backend)
    if not has_seed:
        return
    if tensors["gumbel"] is not None:
        raise ValueError("hycam_modulation: gumbel and seed were both given; noise comes from one of them")
    if tensors["router_weight"] is None and tensors["projections[1]"] is None:
        raise ValueError("hycam_modulation: seed must be None: there are no experts, so there is no noise to draw")
