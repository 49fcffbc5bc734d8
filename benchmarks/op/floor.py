"""The op on a CPU against its matrix products alone, peers taking turns: by size, by threads, by the row's length, and
by what the time consists of.

Times of a shared machine move by a third from run to run; their ratios to the products of the same round by less than a
tenth.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.parts import measure_parts
from benchmarks.harness.record import Entry
from benchmarks.harness.session import on_threads
from benchmarks.harness.timing import HostTimer, Work
from benchmarks.op.checks import Oracle, WrongResultError
from benchmarks.op.measure import Session, describe, dtype_name, time_in_turn
from benchmarks.op.peers import TAU, Arguments, Outputs, Peer, make_arguments, peer, work
from benchmarks.op.shapes import Shape
from hycam_kernels import modulation
from hycam_kernels.backends.torch import modulation as torch_backend
from hycam_kernels.inputs import DIFFERENTIABLE, ModulationInputs
from hycam_kernels.preparation import prepare

PRODUCTS = "products"
PEERS = (PRODUCTS, "torch", "torch-passes", "eager", "compile", "compile-max-autotune")


class Products:
    """The products of a forward and backward that keeps S and V, into memory that is there, with M = N A ready."""

    def __init__(self, arguments: Arguments) -> None:
        self.hidden, self.weight, self.lora_b = (
            arguments[name].detach() for name in ("hidden", "shared_weight", "lora_b")
        )
        (tokens, d), (experts, _, rank) = self.hidden.shape, self.lora_b.shape
        self.folded = torch.randn(experts * rank, d).to(self.hidden.dtype)

        def ready(*shape: int) -> Tensor:
            return torch.randn(shape).to(self.hidden.dtype)

        self.s, self.d_s, self.z, self.d_hidden = (ready(tokens, d) for _ in range(4))
        self.v, self.d_v = (ready(tokens, experts * rank) for _ in range(2))
        self.d_weight, self.d_folded, self.d_lora_b = ready(d, d), ready(experts * rank, d), ready(experts, d, rank)

    def __call__(self) -> None:
        v, d_v = (tensor.chunk(len(self.lora_b), dim=1) for tensor in (self.v, self.d_v))
        torch.mm(self.hidden, self.weight.T, out=self.s)
        torch.mm(self.hidden, self.folded.T, out=self.v)
        for v_k, b_k in zip(v, self.lora_b, strict=True):
            torch.mm(v_k, b_k.T, out=self.z)
        for v_k, d_v_k, b_k, d_b_k in zip(v, d_v, self.lora_b, self.d_lora_b, strict=True):
            torch.mm(v_k, b_k.T, out=self.z)
            torch.mm(self.z, b_k, out=d_v_k)
            torch.mm(self.z.T, v_k, out=d_b_k)
        torch.mm(self.d_s.T, self.hidden, out=self.d_weight)
        torch.mm(self.d_v.T, self.hidden, out=self.d_folded)
        torch.mm(self.d_s, self.weight, out=self.d_hidden)
        torch.addmm(self.d_hidden, self.d_v, self.folded, out=self.d_hidden)


class _TorchPasses(torch.autograd.Function):
    """The torch backend with its own passes, also where the native ones are there."""

    @staticmethod
    def forward(ctx, *inputs):
        out, load, router_prob, saved = torch_backend.forward(ModulationInputs(*inputs))
        modulation._setup_context(ctx, inputs, (out, load, router_prob, *saved))
        return out, load, router_prob

    @staticmethod
    def backward(ctx, *grads):
        at, kept = len(ctx.options), ctx.saved_tensors
        tensors = zip(kept[:at], ctx.options, strict=True)
        inputs = ModulationInputs(*(option if tensor is None else tensor for tensor, option in tensors))
        needs = list(ctx.needs_input_grad[: len(DIFFERENTIABLE)])
        d_out, d_load, d_router_prob = grads
        found = torch_backend.backward(d_out, d_load, d_router_prob, inputs, modulation.Saved(*kept[at:]), needs)
        wanted = (grad if need else None for grad, need in zip(found, needs, strict=True))
        return *wanted, *(None,) * (at - len(DIFFERENTIABLE))


def torch_passes(arguments: Arguments) -> Outputs:
    tensors = {name: tensor for name, tensor in arguments.items() if name != "gumbel"}
    out, load, router_prob = _TorchPasses.apply(*prepare(**tensors, tau=TAU, backend="torch"))
    return out.view(arguments["attn_output"].shape), (load * router_prob).sum()


def _products_work(products: Products) -> Work:
    return Work(lambda i: i, lambda _: products(), 1)


def measure_products(
    session: Session, shape: Shape, dtype: torch.dtype, threads: int, names: Sequence[str] = PEERS,
    seconds: float = 90.0,
) -> None:  # fmt: skip
    """Forward and backward of each peer beside the products alone, on one thread by its processor's time.

    Args:
        names: the products first.
        seconds: that the budget must still have: a compiler needs half a minute for each of its peers.
    """
    labels = {"dtype": dtype_name(dtype), "beside": list(names), "pass": "both", "threads": threads}
    if not session.starts(seconds, "products", shape, **labels):
        return
    with on_threads(threads):
        works = _works(session, "products", shape, dtype, labels)
        time_in_turn(session, "products", shape, labels, HostTimer(warmup=3, cpu_time=threads == 1), works)


def measure_profile(session: Session, shape: Shape, dtype: torch.dtype, seconds: float = 10.0) -> None:
    """What forward and backward of the op consist of on one thread, beside the products alone.

    Args:
        seconds: that the budget must still have.
    """
    labels = {"dtype": dtype_name(dtype), "beside": [PRODUCTS, "torch"], "pass": "both"}
    if session.starts(seconds, "profile", shape, **labels):
        measure_parts(session, shape, labels, _works(session, "profile", shape, dtype, labels))


def _works(
    session: Session, group: str, shape: Shape, dtype: torch.dtype, labels: Entry
) -> dict[str, Callable[[], Work]]:
    """The products, and forward and backward of the other peers that are right."""
    arguments = make_arguments(shape, dtype, session.device)
    works: dict[str, Callable[[], Work]] = {}
    oracle = Oracle(arguments, "paper")
    for name in labels["beside"]:
        if name == PRODUCTS:
            works[name] = partial(_products_work, Products(arguments))
            continue
        try:
            candidate = Peer(name, "paper", torch_passes) if name == "torch-passes" else peer(name)
            oracle.check(candidate)
            works[name] = partial(work, candidate.call, [arguments], "both")
        except WrongResultError as error:
            session.add(group, shape, **labels, peer=name, wrong=str(error))
        except Exception as error:  # compilers raise classes of their own; the other peers are still measured
            session.add(group, shape, **labels, peer=name, error=describe(error))
    return works
