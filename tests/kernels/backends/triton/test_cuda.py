"""What a GPU alone can show: CUDA graphs, streams, other devices, and that nothing waits for the device."""

import contextlib

import pytest
import torch
from torch import Tensor

from hycam_kernels import hycam_modulation
from tests.kernels.backends.triton.conftest import INTERPRETING
from tests.kernels.cases import Case, leaves

pytestmark = pytest.mark.skipif(INTERPRETING, reason="needs a GPU: the interpreter has no streams and no graphs")

CALLS = {
    "training": Case((130,), 256, 5, 64, masked=True),
    "recompute": Case((130,), 256, 5, 64, options={"recompute": True}),
    "released": Case((77,), 200, 3, 16, biases=True, residual=True, options={"hard": True, "scale": 8.0}),
    "decode": Case((3,), 256, 5, 64),
}


def _arguments(name: str, device: torch.device | str, draw: int = 0) -> dict:
    """bfloat16 arguments on the device, the seed too; those of decoding need no gradient."""
    arguments = CALLS[name].make(torch.bfloat16, seed=draw)
    moved = {k: v.detach().to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    if name != "decode":
        for key in leaves(arguments):
            moved[key].requires_grad_()
    return moved | {"seed": torch.tensor(7 + draw, device=device)}


def _step(arguments: dict) -> list[Tensor]:
    """Outputs, and every gradient where there is one."""
    out = hycam_modulation(**arguments, backend="triton")
    wanted = list(leaves(arguments).values())
    if not wanted:
        return [*out]
    scalar = out.hidden_states.float().square().sum() + 3 * out.balance_loss + out.load[0]
    return [*(part.detach() for part in out), *torch.autograd.grad(scalar, wanted)]


def _assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@contextlib.contextmanager
def _other_stream():
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("name", CALLS)
def test_a_graph_replays_with_other_inputs_and_noise(name, device):
    arguments = _arguments(name, device)
    with _other_stream():
        first = _step(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(arguments)
    graph.replay()
    _assert_equal(captured, first)

    other = _arguments(name, device, draw=1)
    with torch.no_grad():
        for key, value in other.items():
            if isinstance(value, Tensor):
                arguments[key].copy_(value)
    graph.replay()
    _assert_equal(captured, _step(other))
    assert not torch.equal(captured[1], first[1])


@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(name, device):
    arguments = _arguments(name, device)
    want = _step(arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = _step(arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    _assert_equal(got, want)


@pytest.mark.parametrize("name", CALLS)
def test_runs_on_the_current_stream(name, device):
    """Behind a long product on that stream, which a launch on another one would overtake."""
    arguments = _arguments(name, device)
    want = _step(arguments)
    late = torch.zeros_like(arguments["hidden"])
    work = torch.randn(8192, 8192, device=device)
    with _other_stream():
        for _ in range(8):
            work = work @ work
        with torch.no_grad():
            late.copy_(arguments["hidden"])
        got = _step(arguments | {"hidden": late.requires_grad_(arguments["hidden"].requires_grad)})
    _assert_equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", CALLS)
def test_runs_on_a_device_that_is_not_the_current_one(name):
    want = _step(_arguments(name, "cuda:0"))
    with torch.cuda.device(0):
        got = _step(_arguments(name, "cuda:1"))
    assert all(part.device.index == 1 for part in got)
    _assert_equal([part.to("cuda:0") for part in got], want)
