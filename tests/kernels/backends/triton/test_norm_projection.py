"""`norm_project` on the fused kernels: values and gradients against float64, memory, and the calls it refuses."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from hycam_kernels import NormProjectOutput, norm_project
from hycam_kernels.backends.triton import modulation as triton_backend
from hycam_kernels.backends.triton import norm_projection as norm_triton_backend
from hycam_kernels.inputs import NORM_DIFFERENTIABLE, NormProjectInputs, NormSaved, NormUpstream
from tests.kernels.backends.triton.guards import GuardedAllocations, Guards
from tests.kernels.cases import assert_as_good_as_eager, errors, kept_bytes, leaves
from tests.kernels.norm_cases import NormCase, norm_reference_results, run_norm

kernels = pytest.importorskip("hycam_kernels.backends.triton.kernels.norm_projection")
from hycam_kernels.backends.triton.config_tables import families
from hycam_kernels.backends.triton.launch import Launcher

CASES = {
    "rms": NormCase((77,), 96, 3, 16),
    "layer": NormCase((130,), 80, 3, 16, kind="layer", bias=True, eps=1e-5),
    "layer-without-bias": NormCase((5, 15), 200, 3, 4, kind="layer", eps=1e-5),
    "far-from-zero": NormCase((33,), 200, 2, 4, kind="layer", bias=True, offset=20.0),
    "large-eps": NormCase((9,), 96, 1, 4, eps=2.0),
    "one-token": NormCase((1,), 200, 1, 4),
    "no-leading-dimension": NormCase((), 96, 3, 4, kind="layer"),
    "many-experts": NormCase((70,), 80, 8, 5),
    "rank-64": NormCase((130,), 200, 3, 64),
    "one-feature": NormCase((9,), 1, 2, 3),
}
# every case in bfloat16, some in float16 and float32 (in float32 all are compared with the torch backend below)
COVERING = [(name, torch.bfloat16) for name in CASES if name != "one-feature"] + [
    (name, dtype) for dtype in (torch.float16, torch.float32) for name in ("rms", "layer", "one-token", "many-experts")
]


def run_fused(arguments: dict, device: torch.device) -> dict[str, Tensor]:
    """`run_norm` of the triton backend on ``device``, results on the CPU."""

    def on_device(**arguments) -> NormProjectOutput:
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
        return NormProjectOutput(*(part.cpu() for part in norm_project(**moved, backend="triton")))

    return run_norm(on_device, arguments)


@pytest.mark.parametrize(("name", "dtype"), COVERING)
def test_is_as_good_as_eager(name, dtype, device):
    assert_as_good_as_eager(
        lambda arguments: run_fused(arguments, device), CASES[name], dtype, draws=2, reference=norm_reference_results
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "d", "num_experts", "rank"), list(itertools.product((1, 77, 130), (80, 96, 200), (1, 3, 8), (4, 16, 64)))
)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_ragged_shape_is_as_good_as_eager(tokens, d, num_experts, rank, kind, dtype, device):
    case = NormCase((tokens,), d, num_experts, rank, kind=kind, bias=kind == "layer")
    assert_as_good_as_eager(
        lambda arguments: run_fused(arguments, device), case, dtype, draws=2, reference=norm_reference_results
    )


@pytest.mark.parametrize("name", CASES)
def test_equals_the_torch_backend(name, device):
    arguments = CASES[name].make(torch.float32)
    want = run_norm(norm_project, arguments, backend="torch")
    for result, (whole, row) in errors(run_fused(arguments, device), want).items():
        assert whole < 5e-5, (result, whole)
        assert row < 2e-4, (result, row)


def test_rms_is_rounded_twice_as_in_llama(device):
    """h is the backbone's own but for the statistics' last bit, which moves few roundings."""
    arguments = CASES["rms"].make(torch.bfloat16)
    got = run_fused(arguments, device)["hidden"]
    want = norm_project(**arguments, backend="torch").hidden
    assert (got == want).float().mean() > 0.999


@pytest.mark.parametrize("family", ["interpreter", *(pytest.param(f, marks=pytest.mark.slow) for f in families())])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["rms", "layer", "rank-64"])
def test_forward_kernel_equals_the_equation(name, dtype, family, device):
    """With the tiles of every GPU family; on a GPU only with its own."""
    if family != "interpreter" and device.type == "cuda":
        pytest.skip("the tiles of another family needn't fit this GPU")
    launch = triton_backend.launcher(device) if family == "interpreter" else Launcher(family, inline_assembly=False)
    arguments = CASES[name].make(dtype)
    arguments = {k: v.detach().to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    x = NormProjectInputs(**arguments, compute_dtype=dtype, backend="triton")
    generator = torch.Generator().manual_seed(1)
    rows = x.num_experts * (x.rank + 1)
    projection = (torch.randn(rows, x.shape[1], generator=generator) / x.shape[1] ** 0.5).to(device, dtype)
    hidden, v, logits, _, _ = kernels.norm_projection(launch, x, projection)
    want_hidden, want_rows = kernels.norm_projection_reference(
        x.hidden_in.double(), x.norm_weight.double(), None if x.norm_bias is None else x.norm_bias.double(),
        projection.double(), x.eps, x.kind,
    )  # fmt: skip
    got = {"hidden": hidden, "v": v, "logits": logits}
    want = {"hidden": want_hidden, "v": want_rows[:, : v.shape[1]], "logits": want_rows[:, v.shape[1] :]}
    tolerance = 1e-6 if dtype == torch.float32 else 6e-3
    for result, (whole, row) in errors(got, want).items():
        assert whole < tolerance, (result, whole)
        assert row < 4 * tolerance, (result, row)


def test_costs():
    """At T = 8192, d = 4096 in bfloat16: two activations forward and three backward, plus what is small beside them."""
    activation = 2 * 8192 * 4096
    forward = kernels.norm_projection_cost(8192, 4096, 5, 64)
    assert 2 < forward.bytes / activation < 2.2
    assert forward.flops == 2 * 8192 * 4096 * (5 * 64 + 5)
    assert kernels.norm_backward_cost(8192, 4096).bytes == 3 * activation


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_mixed_dtypes(kind, device):
    """fp32 adapters on a bf16 backbone: products in bf16, gradients in the dtype of their tensor."""
    case = dataclasses.replace(CASES["rms"], kind=kind)
    arguments = case.make(torch.bfloat16, torch.float32)
    got = run_fused(arguments, device)
    assert got["hidden"].dtype == got["v"].dtype == torch.bfloat16
    assert got["logits"].dtype == torch.float32
    for name, leaf in leaves(arguments).items():
        assert got[f"grad_{name}"].dtype == leaf.dtype, name
    assert_as_good_as_eager(
        lambda arguments: run_fused(arguments, device),
        case, torch.bfloat16, torch.float32, draws=2, reference=norm_reference_results,
    )  # fmt: skip


def test_autocast(device):
    """The norm stays in float32, the projections run in bfloat16: as the torch backend does."""
    arguments = CASES["rms"].make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast(device.type, torch.bfloat16):
        got = run_fused(arguments, device)
        want = run_norm(norm_project, arguments, backend="torch")
    assert got["hidden"].dtype == torch.float32
    assert got["v"].dtype == torch.bfloat16
    for name, (whole, _) in errors(got, want).items():
        assert got[name].dtype == want[name].dtype, name
        assert whole < (1e-6 if name == "hidden" else 1e-2), (name, whole)


@pytest.mark.parametrize("used", ["hidden", "v", "logits"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_gradients_of_one_result_alone(kind, used, device):
    def gradients(backend: str) -> list[Tensor]:
        made = NormCase((9,), 80, 3, 4, kind=kind).make(torch.float32)
        arguments = {k: v.detach().to(device) if isinstance(v, Tensor) else v for k, v in made.items()}
        wanted = [arguments[name].requires_grad_() for name in leaves(made)]
        # a sum's gradient is one number, expanded: no dense rows
        result = getattr(norm_project(**arguments, backend=backend), used).sum()
        return list(torch.autograd.grad(result, wanted))

    for got, want in zip(gradients("triton"), gradients("torch"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_small_gradients_of_the_logits_survive_float16(device):
    """A token's share of the balance loss is below float16's smallest number."""

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        made = NormCase((77,), 80, 3, 4).make(torch.float16, torch.float32)
        arguments = {k: v.detach().to(device) if isinstance(v, Tensor) else v for k, v in made.items()}
        for name in ("hidden_in", "norm_weight"):
            arguments[name] = arguments[name].to(dtype)
        weight = arguments["router_weight"].requires_grad_()
        logits = norm_project(**arguments, backend=backend).logits
        return torch.autograd.grad(logits, weight, torch.full_like(logits, 1e-9))[0]

    want = gradient(torch.float32, "torch")
    for backend in ("triton", "torch"):
        torch.testing.assert_close(
            gradient(torch.float16, backend), want, rtol=0.01, atol=0.01 * want.abs().max().item()
        )


@pytest.mark.parametrize("skipped", ["hidden_in", "norm_weight", "norm_bias", "lora_a", "lora_n", "router_weight"])
def test_gradients_do_not_depend_on_which_are_asked_for(skipped, device):
    case = dataclasses.replace(CASES["layer"], leading=(9,))
    whole = run_fused(case.make(torch.float32), device)
    arguments = case.make(torch.float32)
    arguments[skipped].requires_grad_(False)
    for name, value in run_fused(arguments, device).items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_no_tokens(kind, device):
    arguments = NormCase((0, 3), 80, kind=kind, bias=kind == "layer").make(torch.float32)
    got = run_fused(arguments, device)
    assert got["hidden"].shape == (0, 3, 80)
    assert got["v"].shape == (0, 3, 3, 4)
    for name, leaf in leaves(arguments).items():
        assert torch.equal(got[f"grad_{name}"], torch.zeros_like(leaf)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["rms", "layer", "many-experts", "one-token"])
def test_touches_no_memory_but_its_own(name, dtype, device):
    """Input rows with poisoned gaps, outputs poisoned before: same bits, and every gap as it was."""
    case = CASES[name]
    arguments = {k: v.detach().to(device) if isinstance(v, Tensor) else v for k, v in case.make(dtype).items()}
    arguments["hidden_in"] = arguments["hidden_in"].flatten(0, -2)
    tokens, count = arguments["hidden_in"].shape[0], case.num_experts
    grads = [torch.randn(tokens, width, device=device) for width in (case.d, count * case.rank, count)]
    grads = [grads[0].to(dtype), grads[1].to(dtype), grads[2]]
    needs = [arguments[field] is not None for field in NORM_DIFFERENTIABLE]

    def both_passes(arguments: dict, grads: list[Tensor]) -> list[Tensor]:
        x = NormProjectInputs(**arguments, compute_dtype=dtype, backend="triton")
        hidden, v, logits, mean, rstd = norm_triton_backend.forward(x)
        return [
            hidden,
            v,
            logits,
            *norm_triton_backend.backward(NormUpstream(*grads), x, NormSaved(hidden, mean, rstd), needs),
        ]

    guards = Guards()
    guarded = {
        name: guards.copy(value, gap=24 if name == "hidden_in" else 0) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    # oneDNN's bfloat16 products read past a row's end where d isn't a multiple of 32
    with torch.backends.mkldnn.flags(enabled=False):
        with GuardedAllocations(guards) as allocations:
            got = both_passes(guarded, [guards.copy(grad) for grad in grads])
        assert allocations.count > 5
        guards.check()
        want = both_passes(arguments, grads)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.isfinite().all(), index
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["rms", "layer"])
def test_bit_equal_from_run_to_run(name, device):
    arguments = CASES[name].make(torch.bfloat16)
    first = run_fused(arguments, device)
    for result, value in run_fused(arguments, device).items():
        assert torch.equal(value, first[result]), result


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_kept_for_backward(kind, device):
    """Beside the arguments and h, one or two float32 numbers a token."""
    arguments = NormCase(leading=(64,), d=512, kind=kind).make(torch.bfloat16)
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    kept = kept_bytes(norm_project, arguments, backend="triton")
    assert 0 < kept - 64 * 512 * 2 <= 64 * 4 * (1 if kind == "rms" else 2)


@pytest.mark.parametrize("name", ["rms", "layer"])
def test_opcheck(name, device):
    made = dataclasses.replace(CASES[name], leading=(9,)).make(torch.float32)
    arguments = {k: v.detach().to(device).requires_grad_() if isinstance(v, Tensor) else v for k, v in made.items()}
    call = NormProjectInputs(**arguments, compute_dtype=torch.float32, backend="triton")
    torch.library.opcheck(torch.ops.hycam.norm_project.default, tuple(call))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_in": torch.zeros(3, 80, dtype=torch.float64)}, "float64"),
        ({"hidden_in": torch.zeros(80, 3).T}, "hidden_in has a last stride of 3"),
    ],
)
def test_says_what_it_cannot_run(changes, reason, device):
    arguments = NormCase((3,), 80).make(torch.float32) | changes
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=f"backend='triton' can't run this call: .*{reason}"):
        norm_project(**arguments, backend="triton")
