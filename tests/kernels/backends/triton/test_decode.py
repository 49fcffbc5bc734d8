"""Decoding, 1 to 64 tokens without gradients: values against float64, two launches, and when these kernels run."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hycam_kernels import HyCAMOutput, gumbel_noise, hycam_modulation
from hycam_kernels.backends.triton import modulation as triton_backend
from hycam_kernels.preparation import prepare
from hycam_kernels.reference import modulation_reference
from tests.kernels.backends.triton.guards import GuardedAllocations, Guards
from tests.kernels.cases import Case, assert_as_good_as_eager, cast_floats, errors, packed

decode = pytest.importorskip("hycam_kernels.backends.triton.kernels.decode")
from hycam_kernels.backends.triton.config_tables import families
from hycam_kernels.backends.triton.launch import Launcher

CASES = {
    "evaluation": Case((1, 7), 96, 3, 16),
    "one-token": Case((1,), 200, 1, 4),
    "no-leading-dimension": Case((), 80, 3, 4),
    "sampled": Case((5,), 96, 3, 16, options={"seed": 3}),
    "all-tokens": Case((64,), 200, 3, 64),
    "many-experts": Case((33,), 80, 8, 4, masked=True, options={"seed": 3, "tau": 2.5}),
    "sixteen-experts": Case((17,), 80, 16, 5),
    "rank-over-a-block": Case((3,), 80, 2, 144, biases=True, residual=True),
    "most-experts-of-rank-1": Case((9,), 33, 16, 1, options={"seed": 3}),
    "rank-256": Case((9,), 48, 1, 256),
    "hard": Case((16,), 80, 3, 16, masked=True, options={"hard": True}),
    "released": Case((33,), 96, 5, 16, biases=True, residual=True, options={"seed": 3, "hard": True, "scale": 8.0}),
    "experts-only": Case((7,), 80, 3, 16, shared=False, biases=True),
    "shared-only": Case((7,), 96, experts=None, biases=True, residual=True),
    "no-branch": Case((7,), 80, shared=False, experts=None),
}
# every case in bfloat16, some in float16 and float32 (in float32 all are compared with the torch backend below)
COVERING = [(name, torch.bfloat16) for name in CASES] + [
    (name, dtype)
    for dtype in (torch.float16, torch.float32)
    for name in ("one-token", "many-experts", "rank-over-a-block", "released", "shared-only")
]


def moved(arguments: dict, device: torch.device) -> dict:
    return {k: v.detach().to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def results(output: HyCAMOutput) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in zip(output._fields, output, strict=True)}


def decoded(arguments: dict, device: torch.device) -> dict[str, Tensor]:
    with torch.no_grad():
        return results(hycam_modulation(**moved(arguments, device), backend="triton"))


def reference(arguments: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    with torch.no_grad():
        return results(modulation_reference(**cast_floats(arguments, dtype)))


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the kernels launched."""
    names = []
    launch = Launcher.__call__

    def record(self, kernel, *arguments, **options):
        names.append(kernel.fn.__name__)
        launch(self, kernel, *arguments, **options)

    monkeypatch.setattr(Launcher, "__call__", record)
    return names


@pytest.mark.parametrize(("name", "dtype"), COVERING)
def test_is_as_good_as_eager(name, dtype, device, launched):
    assert_as_good_as_eager(
        lambda arguments: decoded(arguments, device), CASES[name], dtype, draws=3, reference=reference
    )
    assert set(launched) <= {"decode_down_kernel", "decode_fusion_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "d", "num_experts", "rank"), list(itertools.product((1, 7, 64), (80, 96, 200), (1, 3, 8), (4, 16, 64)))
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_ragged_shape_is_as_good_as_eager(tokens, d, num_experts, rank, dtype, device):
    case = Case((tokens,), d, num_experts, rank, masked=True, biases=True)
    assert_as_good_as_eager(lambda arguments: decoded(arguments, device), case, dtype, draws=2, reference=reference)


def test_logits_of_a_wide_layer(device, truncating_products):
    """The error that truncated sums make grows with d: one chain of them over half of d is far from eager's."""
    case = Case((16,), 4096, 3, 1, shared=False)
    assert_as_good_as_eager(
        lambda arguments: decoded(arguments, device), case, torch.float16, draws=1, reference=reference
    )


@pytest.mark.parametrize("name", CASES)
def test_equals_the_torch_backend_and_the_training_kernels(name, device):
    arguments = CASES[name].make(torch.float32)
    got = decoded(arguments, device)
    torch_results = results(hycam_modulation(**arguments, backend="torch"))
    trained = results(
        hycam_modulation(
            **{k: v.requires_grad_() if k == "hidden" else v for k, v in moved(arguments, device).items()},
            backend="triton",
        )
    )
    for want in (torch_results, trained):
        for result, (whole, row) in errors(got, {k: v.detach() for k, v in want.items()}).items():
            assert whole < 1e-5, (result, whole)
            assert row < 1e-4, (result, row)


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["all-tokens", "one-token", "released", "rank-over-a-block"])
def test_with_the_tiles_of_every_family(name, dtype, family, device):
    if device.type == "cuda":
        pytest.skip("the tiles of another family needn't fit this GPU")
    arguments = moved(CASES[name].make(dtype), device)
    out, load, router_prob, _ = decode.decode_forward(
        Launcher(family, inline_assembly=False), prepare(**arguments, backend="triton")
    )
    got = {"hidden_states": out.view(arguments["hidden"].shape), "load": load, "router_prob": router_prob}
    truth = reference(arguments, torch.float64)
    for result, (whole, _) in errors(got, {key: truth[key] for key in got}).items():
        assert whole < (1e-6 if dtype == torch.float32 else 1e-2), (result, whole)


@pytest.mark.parametrize("name", ["evaluation", "released", "no-branch"])
def test_weights_and_streams_of_other_dtypes(name, device):
    """fp32 adapters on a bf16 backbone and an fp32 stream: read as they are, products in bf16."""

    def function(arguments):
        return decoded(widened(arguments), device)

    def widened(arguments):
        return arguments | {"attn_output": arguments["attn_output"].float()}

    case = CASES[name]
    assert function(case.make(torch.bfloat16, torch.float32))["hidden_states"].dtype == torch.float32
    assert_as_good_as_eager(function, case, torch.bfloat16, torch.float32, draws=3, reference=reference)


def test_autocast(device):
    arguments = CASES["evaluation"].make(torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        got = decoded(arguments, device)
    rounded = {
        k: v.to(torch.bfloat16) if isinstance(v, Tensor) and k != "attn_output" else v for k, v in arguments.items()
    }
    want = decoded(rounded, device)
    assert got["hidden_states"].dtype == torch.float32
    for name in ("hidden_states", "load", "router_prob"):
        torch.testing.assert_close(got[name], want[name].to(got[name].dtype), rtol=1e-6, atol=1e-6)


def test_noise_is_gumbel_noise(device):
    arguments = Case((3, 13), 80, 5, 4).make(torch.float32)
    noise = gumbel_noise(7, 39, 5).view(3, 13, 5)
    torch.testing.assert_close(decoded(arguments | {"seed": 7}, device), decoded(arguments | {"gumbel": noise}, device))


def test_mask_that_counts_no_token(device):
    arguments = CASES["hard"].make(torch.float32)
    arguments["token_mask"] = torch.zeros_like(arguments["token_mask"])
    got = decoded(arguments, device)
    assert not got["load"].any()
    assert not got["router_prob"].any()
    assert got["hidden_states"].isfinite().all()


def test_a_token_that_does_not_count_may_be_nan(device):
    arguments = moved(CASES["many-experts"].make(torch.float32), device)
    want = decoded(arguments, device)
    arguments["hidden"][~arguments["token_mask"]] = float("nan")
    got = decoded(arguments, device)
    for name in ("load", "router_prob", "balance_loss"):
        assert torch.equal(got[name], want[name]), name


def test_two_launches_at_most_and_nothing_read_by_the_host(device, launched, monkeypatch):
    arguments = moved(CASES["released"].make(torch.bfloat16), device) | {"seed": torch.tensor(3, device=device)}
    with torch.no_grad():
        x = prepare(**arguments, backend="triton")
        want = triton_backend.decode(x)
        for name in ("item", "__int__", "__bool__", "__index__", "tolist"):
            monkeypatch.setattr(Tensor, name, None)
        got = triton_backend.decode(x)
        monkeypatch.undo()
    assert launched == ["decode_down_kernel", "decode_fusion_kernel"] * 2
    assert torch.equal(got[0], want[0])


class Calls(TorchDispatchMode):
    """Names of the operators that run in the block, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_runs_between_the_launches(device, monkeypatch):
    """The second may begin before the one before it ends, and waits for that one alone: no copy may come between."""
    arguments = moved(CASES["released"].make(torch.bfloat16), device) | {"seed": 3}
    for name in ("shared_weight", "lora_n", "lora_b", "shared_bias", "lora_b_bias"):
        arguments[name] = torch.stack([arguments[name]] * 2, dim=-1)[..., 0]
        assert arguments[name].stride(-1) == 2
    x = prepare(**arguments, backend="triton")
    seen: list[list[str]] = []
    with Calls() as calls:
        monkeypatch.setattr(Launcher, "__call__", lambda *a, **k: seen.append(list(calls.names)))
        decode.decode_forward(triton_backend.launcher(device), x)
    assert len(seen) == 2
    assert "clone" in seen[0]
    assert seen[1] == seen[0]


@pytest.mark.parametrize("name", ["released", "shared-only"])
def test_nothing_runs_beside_the_launches_but_allocation(name, device, monkeypatch):
    arguments = moved(CASES[name].make(torch.bfloat16), device)
    if arguments.get("seed") is not None:
        arguments["seed"] = torch.tensor(3, device=device)
    with torch.no_grad(), Calls() as outer:
        hycam_modulation(**arguments, backend="triton")
    # promote_types works on dtypes: no tensor, no launch
    assert set(outer.names) <= {"modulation_decode", "view", "detach", "promote_types"}
    x = prepare(**arguments, backend="triton")
    # the interpreter copies tensors of its own accord
    monkeypatch.setattr(Launcher, "__call__", lambda *_, **__: None)
    with Calls() as inner:
        triton_backend.decode(x)
    assert set(inner.names) <= {"empty", "view", "detach"}


@pytest.mark.parametrize("name", ["evaluation", "released", "shared-only"])
def test_opcheck(name, device):
    call = prepare(**moved(CASES[name].make(torch.float32), device), backend="triton")
    torch.library.opcheck(torch.ops.hycam.modulation_decode.default, tuple(call))


def test_compiles_into_one_graph(device):
    compiled = torch.compile(hycam_modulation, backend="aot_eager", fullgraph=True)
    arguments = moved(CASES["evaluation"].make(torch.float32), device)
    with torch.no_grad():
        want = results(hycam_modulation(**arguments, backend="triton"))
        got = results(compiled(**arguments, backend="triton"))
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


def test_without_experts_one_launch(device, launched):
    decoded(CASES["shared-only"].make(torch.bfloat16), device)
    assert launched == ["decode_fusion_kernel"]


@pytest.mark.parametrize(
    ("tokens", "grad", "decodes"), [(64, False, True), (65, False, False), (64, True, False), (0, False, False)]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_runs_for_few_tokens_without_gradients(tokens, grad, decodes, recompute, device, launched):
    arguments = moved(Case((tokens,), 80, 2, 4).make(torch.float32), device)
    if grad:
        arguments["hidden"].requires_grad_()
    hycam_modulation(**arguments, recompute=recompute, backend="triton")
    assert ("decode_fusion_kernel" in launched) == decodes


def test_given_projections_take_the_training_kernels(device, launched):
    arguments = moved(Case((5,), 80, 2, 4, experts="projected").make(torch.float32), device)
    hycam_modulation(**packed(arguments), backend="triton")
    assert launched == ["router_kernel", "token_mean_kernel", "fusion_forward_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["evaluation", "many-experts", "rank-over-a-block", "released", "shared-only"])
def test_touches_no_memory_but_its_own(name, dtype, device):
    """Inputs with poisoned gaps between rows, outputs poisoned before: same bits, and every gap as it was."""
    arguments = moved(dataclasses.replace(CASES[name], leading=(19,)).make(dtype), device)

    def forward(arguments: dict) -> list[Tensor]:
        return list(triton_backend.decode(prepare(**arguments, backend="triton")))

    guards = Guards()
    rows = ("hidden", "attn_output", "residual", "shared_weight", "router_weight")
    guarded = {
        name: guards.copy(value, gap=24 if name in rows else 0)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
    with GuardedAllocations(guards) as allocations:
        got = forward(guarded)
    assert allocations.count > 0
    guards.check()
    for a, b in zip(got, forward(arguments), strict=True):
        assert torch.equal(a, b)


def test_weights_in_any_layout(device):
    arguments = CASES["released"].make(torch.float32)
    transposed = {
        name: arguments[name].detach().mT.contiguous().mT
        for name in ("shared_weight", "lora_a", "lora_n", "lora_b", "router_weight", "lora_n_bias", "lora_b_bias")
    }
    want = decoded(arguments, device)
    for name, value in decoded(arguments | transposed, device).items():
        assert torch.equal(value, want[name]), name


def test_bit_equal_from_run_to_run(device):
    arguments = CASES["released"].make(torch.bfloat16)
    first = decoded(arguments, device)
    for name, value in decoded(arguments, device).items():
        assert torch.equal(value, first[name]), name


def test_cost_is_the_weights_once():
    """At d = 4096, one token: W_s, A, B, N and W_r in bfloat16 and little else."""
    weights = 2 * (4096**2 + 5 * (2 * 64 * 4096 + 64**2 + 4096))
    assert 1 <= decode.decode_cost(1, 4096, 5, 64).bytes / weights < 1.001
