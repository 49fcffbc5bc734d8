"""The op on devices that are not here: Apple's and Intel's GPUs, by tensors without data."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hycam_kernels import explain_backend, hycam_modulation
from hycam_kernels.backends.cpu import modulation as cpu_backend
from hycam_kernels.backends.torch import inference, modulation
from hycam_kernels.inputs import DIFFERENTIABLE, ModulationInputs
from hycam_kernels.preparation import prepare
from tests.kernels.cases import Case, packed

DEVICES = ("mps:0", "xpu:0")
CASES = {
    "experts": Case(masked=True, residual=True, biases=True, options={"seed": 3}),
    "hard": Case(options={"seed": 3, "hard": True}),
    "full rank": Case(experts="full"),
    "projected": Case(experts="projected"),
    "shared alone": Case(experts=None),
}


class Dtypes(TorchDispatchMode):
    """Collects the dtypes of what every operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.found |= {leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


def empty(value, device: str):
    return torch.empty(value.shape, dtype=value.dtype, device=device) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("device", DEVICES)
def test_the_torch_backend_is_chosen_and_the_kernels_say_why(device):
    arguments = CASES["experts"].make(torch.float32)
    with FakeTensorMode():
        there = {name: empty(value, device) for name, value in arguments.items()}
        reason = f"hidden is on {device}: it needs a CUDA device"
        assert explain_backend(**there).startswith(f"torch: the triton backend can't run this call: {reason}")
        with pytest.raises(RuntimeError, match=reason):
            hycam_modulation(**there, backend="triton")
        assert cpu_backend.refusal(prepare(**there))


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_stays_on_the_device_and_none_is_float64(name):
    """Fake tensors refuse an operator over two devices; Apple's GPUs have no float64."""
    here = prepare(**packed(CASES[name].make(torch.float32)))
    needs = [getattr(here, field) is not None for field in DIFFERENTIABLE]
    with FakeTensorMode(), Dtypes() as dtypes:
        # the device "meta" is none of the CPU's, and torch copies there without a driver; a seed may be anywhere
        inputs = ModulationInputs(*(empty(value, "meta") for value in here))
        inputs = inputs._replace(seed=empty(here.seed, "cpu"))
        out, load, router_prob, saved = modulation.forward(inputs)
        gradients = modulation.backward(out, load, router_prob, inputs, saved, needs)
        answer, *_ = inference.forward(inputs)
    for tensor in (out, load, router_prob, answer, *(g for g, needed in zip(gradients, needs, strict=True) if needed)):
        assert tensor.device.type == "meta"
    assert torch.float32 in dtypes.found
    assert torch.float64 not in dtypes.found
