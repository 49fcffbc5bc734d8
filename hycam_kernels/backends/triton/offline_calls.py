"""The calls whose launches `aot` builds: on tensors without data, of every kind that the tables tell apart."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from hycam_kernels.inputs import ModulationInputs, NormProjectInputs


def calls() -> Iterator[ModulationInputs | NormProjectInputs]:
    """Calls of every kind, over the ranks, token counts, sizes and dtypes that the tables tell apart."""
    yield from _training_calls()
    yield from _decoding_calls()
    yield from _norm_calls()


def _training_calls() -> Iterator[ModulationInputs]:
    """The paper's op and the released code's."""
    for dtype, tokens, rank in itertools.product((torch.bfloat16, torch.float32), (512, 2400, 8192), (64, 256)):
        yield training_call(tokens, rank, dtype)
    for experts, tokens in itertools.product((1, 16), (512, 2400, 8192)):
        yield training_call(tokens, 64, torch.bfloat16, experts=experts)
    for rank in (16, 64, 256):
        yield training_call(2400, rank, torch.bfloat16, released=True)
    yield training_call(2400, 16, torch.bfloat16)
    yield training_call(2400, 64, torch.float32, released=True)
    yield training_call(2400, 64, torch.float16)
    yield training_call(2400, 64, torch.bfloat16, shared=False)
    yield training_call(2400, 0, torch.bfloat16)
    for tokens, rank in itertools.product((2400, 8192), (16, 64, 256)):
        yield training_call(tokens, rank, torch.bfloat16, keep=False)
        yield training_call(tokens, rank, torch.bfloat16, released=True, keep=False)
    yield training_call(8192, 64, torch.bfloat16, experts=16, keep=False)
    yield training_call(2400, 0, torch.bfloat16, keep=False)
    yield training_call(2400, 64, torch.float16, keep=False)
    yield training_call(2400, 64, torch.bfloat16, projected=True)


def _decoding_calls() -> Iterator[ModulationInputs]:
    """The same with few tokens and no gradients."""
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, d in ((1, 2048), (1, 4096), (16, 4096), (32, 4096), (64, 4096)):
            yield training_call(tokens, 64, dtype, d=d, needs_grad=False)
        yield training_call(16, 256, dtype, needs_grad=False)
        yield training_call(64, 256, dtype, needs_grad=False)
        yield training_call(1, 0, dtype, needs_grad=False)
        yield training_call(64, 64, dtype, released=True, needs_grad=False)
    yield training_call(16, 64, torch.float16, needs_grad=False)


def training_call(
    tokens: int,
    rank: int,
    dtype: torch.dtype,
    *,
    d=4096,
    experts=5,
    released=False,
    shared=True,
    needs_grad=True,
    keep=True,
    projected=False,
) -> ModulationInputs:
    """A call on meta tensors; rank 0 leaves the experts out, ``released`` adds all that the released code does,
    ``projected`` gives V and the logits."""

    def tensor(*shape: int, given: bool = True) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device="meta") if given else None

    E, r = experts, rank
    expert_bias = released and rank > 0
    projects = rank > 0 and not projected
    return ModulationInputs(
        hidden=torch.empty(tokens, d, dtype=dtype, device="meta"),
        attn_output=torch.empty(tokens, d, dtype=dtype, device="meta"),
        shared_weight=tensor(d, d, given=shared),
        lora_a=tensor(E, r, d, given=projects),
        lora_n=tensor(E, r, r, given=projects),
        lora_b=tensor(E, d, r, given=rank > 0),
        router_weight=tensor(E, d, given=projects),
        shared_bias=tensor(d, given=released and shared),
        lora_a_bias=tensor(E, r, given=expert_bias),
        lora_n_bias=tensor(E, r, given=expert_bias),
        lora_b_bias=tensor(E, d, given=expert_bias),
        router_bias=tensor(E, given=expert_bias),
        expert_weight=None,
        residual=tensor(tokens, d, given=released),
        given_v=tensor(tokens, E * r, given=projected),
        given_logits=torch.empty(tokens, E, device="meta") if projected else None,
        gumbel=None,
        seed=torch.empty((), dtype=torch.int64, device="meta") if rank else None,
        token_mask=torch.empty(tokens, dtype=torch.bool, device="meta") if released else None,
        tau=0.5,
        hard=released,
        scale=0.5 if released else 1.0,
        compute_dtype=dtype,
        keep=needs_grad and keep,
        needs_grad=needs_grad,
        backend="triton",
    )


def _norm_calls() -> Iterator[NormProjectInputs]:
    """`norm_project` of both kinds."""
    for dtype in (torch.bfloat16, torch.float32):
        for kind in ("rms", "layer"):
            for tokens, d in ((2400, 2048), (8192, 4096), (8192, 8192)):
                yield norm_call(tokens, d, dtype, kind)
    yield norm_call(2400, 4096, torch.float16, "rms")


def norm_call(tokens: int, d: int, dtype: torch.dtype, kind: str, *, experts=5, rank=64) -> NormProjectInputs:
    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return NormProjectInputs(
        hidden_in=tensor(tokens, d),
        norm_weight=tensor(d),
        norm_bias=tensor(d) if kind == "layer" else None,
        lora_a=tensor(experts, rank, d),
        lora_n=tensor(experts, rank, rank),
        router_weight=tensor(experts, d),
        eps=1e-6,
        kind=kind,
        compute_dtype=dtype,
        backend="triton",
    )
