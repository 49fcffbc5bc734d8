"""The op whose forward makes the shared product itself, chosen by a table."""

import dataclasses

import pytest
import torch
from torch import Tensor

from hycam_kernels import hycam_modulation
from hycam_kernels.backends.triton import modulation as triton_backend
from hycam_kernels.preparation import prepare
from tests.kernels.backends.triton.conftest import INTERPRETING
from tests.kernels.backends.triton.fused import CASES, assert_touches_only_its_own_memory, run_fused
from tests.kernels.cases import Case, assert_as_good_as_eager, errors, leaves, run

pytestmark = pytest.mark.usefixtures("own_product")
SHARED = [name for name, case in CASES.items() if case.shared]
COVERING = [(name, torch.bfloat16) for name in ("paper", "one-token", "rank-over-a-block", "released", "shared-only")]
COVERING += [("paper", torch.float16), ("released", torch.float32)]


def on(device: torch.device, arguments: dict) -> dict:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


@pytest.mark.parametrize(("name", "dtype"), COVERING)
def test_is_as_good_as_eager(name, dtype, device):
    assert_as_good_as_eager(lambda arguments: run_fused(arguments, device), CASES[name], dtype, draws=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHARED)
def test_every_case_is_as_good_as_eager(name, dtype, device):
    assert_as_good_as_eager(lambda arguments: run_fused(arguments, device), CASES[name], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "d"), [(tokens, d) for tokens in (1, 77, 130) for d in (80, 96, 200)])
@pytest.mark.parametrize(("num_experts", "rank"), [(1, 4), (3, 16), (8, 64)])
def test_every_ragged_shape_is_as_good_as_eager(tokens, d, num_experts, rank, dtype, recompute, device):
    case = Case((tokens,), d, num_experts, rank, masked=True, options={"seed": 3})
    assert_as_good_as_eager(lambda arguments: run_fused(arguments, device, recompute=recompute), case, dtype, draws=2)


@pytest.mark.parametrize(
    ("name", "dtype", "keep"),
    [
        ("paper", torch.bfloat16, True),
        ("rank-over-a-block", torch.float32, False),
        ("released", torch.float32, True),
        ("released", torch.bfloat16, False),
        ("shared-only", torch.bfloat16, True),
    ],
)
def test_touches_no_memory_but_its_own(name, dtype, keep, device):
    case = dataclasses.replace(CASES[name], leading=(70,))
    assert_touches_only_its_own_memory(case, dtype, device, recompute=not keep)


def test_the_table_decides(device, monkeypatch):
    """Which kernels run, by whether S is kept, and that a call without a shared branch takes the other form."""
    launch = triton_backend.launcher(device)
    launched = []
    call = type(launch).__call__

    def note(self, kernel, *arguments, **options):
        launched.append(kernel.__name__)
        call(self, kernel, *arguments, **options)

    monkeypatch.setattr(type(launch), "__call__", note)

    def kernels(name: str, **options) -> set[str]:
        launched.clear()
        arguments = on(device, CASES[name].make(torch.bfloat16))
        triton_backend.forward(prepare(**arguments, **options, backend="triton"))
        return set(launched) - {"router_kernel", "token_mean_kernel"}

    for recompute in (False, True):
        assert kernels("paper", recompute=recompute) == {"product_forward_kernel"}
        assert kernels("experts-only", recompute=recompute) == {"fusion_forward_kernel"}
    rows = launch.table["product_forward"]
    monkeypatch.setitem(launch.table, "product_forward", [row | {"kept": False} for row in rows])
    assert kernels("paper") == {"fusion_forward_kernel"}
    assert kernels("paper", recompute=True) == {"product_forward_kernel"}
    monkeypatch.setitem(launch.table, "product_forward", [row | {"candidate": True} for row in rows])
    assert kernels("paper", recompute=True) == {"fusion_forward_kernel"}


def test_keeping_changes_no_bit_of_the_output(device):
    arguments = dataclasses.replace(CASES["released"], leading=(33,)).make(torch.bfloat16)
    kept, not_kept = (run_fused(arguments, device, recompute=recompute) for recompute in (False, True))
    for result in ("hidden_states", "load", "router_prob", "balance_loss"):
        assert torch.equal(kept[result], not_kept[result]), result


def test_strided_inputs(device):
    """Rows apart, rows repeated, and weights and a bias whose elements are apart."""
    case = Case((4, 6), 80, 3, 16, biases=True, residual=True, options={"seed": 3})
    arguments = on(device, case.make(torch.float32))
    strided = dict(arguments)
    for name in ("hidden", "attn_output", "residual", "shared_weight"):
        shape = arguments[name].shape
        wide = torch.full((*shape[:-1], 3 * case.d), float("nan"), device=device)
        wide[..., case.d : 2 * case.d] = arguments[name].detach()
        strided[name] = wide[..., case.d : 2 * case.d]
    strided["shared_bias"] = torch.stack([arguments["shared_bias"].detach()] * 2, 1)[:, 0]
    want = hycam_modulation(**arguments, backend="triton")
    for weight in (strided["shared_weight"], arguments["shared_weight"].detach().T.contiguous().T):
        got = hycam_modulation(**strided | {"shared_weight": weight}, backend="triton")
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    one_row = {name: arguments[name].detach()[:1, :1].expand(4, 6, -1) for name in ("hidden", "attn_output")}
    got = hycam_modulation(**arguments | one_row, backend="triton")
    want = hycam_modulation(**arguments | {k: v.contiguous() for k, v in one_row.items()}, backend="triton")
    torch.testing.assert_close(got, want)


def test_no_tokens(device):
    for name in SHARED:
        case = dataclasses.replace(CASES[name], leading=(0, 3))
        arguments = case.make(torch.bfloat16)
        got = run_fused(arguments, device)
        assert got["hidden_states"].shape == (0, 3, case.d)
        for leaf_name, leaf in leaves(arguments).items():
            assert torch.equal(got[f"grad_{leaf_name}"], torch.zeros_like(leaf)), leaf_name


def test_weights_of_another_dtype(device):
    """fp32 adapters on a bf16 backbone: the product in bf16."""
    case = Case((33,), 80, 3, 16, biases=True, options={"seed": 3})
    assert_as_good_as_eager(
        lambda arguments: run_fused(arguments, device), case, torch.bfloat16, torch.float32, draws=2
    )


@pytest.mark.skipif(not INTERPRETING, reason="the tables of GPUs leave float32 to the library's product")
def test_autocast(device):
    arguments = Case((33,), 80, 3, 16, options={"seed": 3}).make(torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        got = run_fused(arguments, device)["hidden_states"]
        want = run(hycam_modulation, arguments, backend="torch")["hidden_states"]
    assert got.dtype == torch.float32
    for error in errors({"hidden_states": got}, {"hidden_states": want})["hidden_states"]:
        assert 0 < error < 1e-2
