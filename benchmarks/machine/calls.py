"""What a whole call launches, on tensors without data: kernels with their grids, and the library's operations."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.op.peers import TAU
from benchmarks.op.shapes import Shape
from hycam_kernels.backends.triton.config_tables import Table, drop_limits
from hycam_kernels.backends.triton.offline_builds import Launch, Recorder, record_call, specialise
from hycam_kernels.backends.triton.offline_calls import norm_call, training_call
from hycam_kernels.inputs import ModulationInputs
from hycam_kernels.reference import modulation_reference

DTYPE = torch.bfloat16
Reference = Callable[..., tuple[Tensor, ...]]
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# these take of a tensor its shape alone
_FILLS = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")


class Use(NamedTuple):
    """One launch of a call."""

    launch: Launch
    grid: tuple[int, ...]
    values: dict[str, Any]

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


class Operation(NamedTuple):
    """One operation of the library that launches something.

    Attributes:
        flops: of a matrix product, two per multiply-add; 0 of others.
        bytes: read and written, each tensor once.
    """

    name: str
    flops: int
    bytes: int


class UseRecorder(Recorder):
    """A recorder that keeps the launches in their order, with grids and values."""

    def __init__(self, family: str) -> None:
        super().__init__(family)
        self.uses: list[Use] = []

    def __call__(self, kernel, grid, config, **arguments) -> None:
        super().__call__(kernel, grid, config, **arguments)
        self.uses.append(Use(specialise(kernel, dict(config), arguments), grid, arguments | dict(config)))


class OperationLog(TorchDispatchMode):
    """Keeps the operations that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given, made = _tensors((args, kwargs)), _tensors(result)
        if name not in _ALLOCATIONS and not _is_view(func, given, made) and any(tensor.numel() for tensor in made):
            # what is written in place is read too
            moved = sum(_bytes(tensor) for tensor in (*(() if name in _FILLS else given), *made))
            self.operations.append(Operation(name, _flops(name, given, made), moved))
        return result


def _tensors(tree: object) -> list[Tensor]:
    unique = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
    return list(unique.values())


def _is_view(func, given: Sequence[Tensor], made: Sequence[Tensor]) -> bool:
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    return not func._schema.is_mutable and all(tensor.untyped_storage()._cdata in storages for tensor in made)


def _bytes(tensor: Tensor) -> int:
    """Of the elements that differ in their address."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * math.prod(size for size, stride in sizes if stride)


def _flops(name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> int:
    if name.rstrip("_") not in _PRODUCTS:
        return 0
    left = given[-2]
    return 2 * made[0].numel() * left.shape[-1]


def training(recorder: UseRecorder, shape: Shape) -> None:
    """The op forward and backward with every gradient, as the paper has it."""
    record_call(recorder, _training_call(shape))


def training_without_s(recorder: UseRecorder, shape: Shape) -> None:
    """The same with S and V made again by the backward."""
    record_call(recorder, _training_call(shape, keep=False))


def _training_call(shape: Shape, **options: bool) -> ModulationInputs:
    return training_call(shape.tokens, shape.rank, DTYPE, d=shape.d, experts=shape.num_experts, **options)


def decoding(recorder: UseRecorder, shape: Shape) -> None:
    """The op without gradients."""
    record_call(recorder, _training_call(shape, needs_grad=False))


def norm(recorder: UseRecorder, shape: Shape) -> None:
    """`norm_project` of an RMSNorm forward and backward."""
    x = norm_call(shape.tokens, shape.d, DTYPE, "rms", experts=shape.num_experts, rank=shape.rank)
    record_call(recorder, x)


def own_product(table: Table) -> Table:
    """A table in which the forward makes the shared product itself."""
    return table | {"product_forward": drop_limits(table["product_forward"], "candidate", "kept")}


def reference_work(shape: Shape, device: str, through: Callable[[Reference], Reference] = lambda call: call) -> None:
    """The reference under autograd, forward and backward, with ready-made noise; ``through`` may compile it."""
    T, d, E, r = shape.tokens, shape.d, shape.num_experts, shape.rank

    def tensor(*size: int) -> Tensor:
        return torch.empty(size, dtype=DTYPE, device=device, requires_grad=True)

    arguments = (
        tensor(T, d),
        tensor(T, d),
        tensor(d, d),
        tensor(E, r, d),
        tensor(E, r, r),
        tensor(E, d, r),
        tensor(E, d),
    )
    gumbel = torch.empty(T, E, device=device)

    def reference(*tensors: Tensor) -> tuple[Tensor, ...]:
        output = modulation_reference(*tensors, tau=TAU, gumbel=gumbel)
        return output.hidden_states, output.balance_loss

    results = through(reference)(*arguments)
    torch.autograd.grad(results, arguments, [torch.empty_like(result) for result in results])
