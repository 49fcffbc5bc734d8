"""Each kernel against the equation beside it, with the configurations of every GPU family; and what it must move."""

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hycam_kernels import gumbel_noise
from hycam_kernels.backends.triton import modulation as triton_backend
from hycam_kernels.preparation import prepare
from tests.kernels.cases import Case

fusion_forward = pytest.importorskip("hycam_kernels.backends.triton.kernels.fusion_forward")
from hycam_kernels.backends.triton import config_tables
from hycam_kernels.backends.triton.config_tables import OPTIONAL, drop_limits, families, load_table
from hycam_kernels.backends.triton.kernels import (
    fusion_backward,
    product_forward,
    router,
    router_weight_grad,
    sum_parts,
)
from hycam_kernels.backends.triton.launch import Launcher, split

CASES = {
    "paper": Case((77,), 96, 3, 16),
    "ragged": Case((70,), 200, 2, 5, biases=True, residual=True, masked=True, options={"scale": 4.0}),
    "hard": Case((33,), 80, 5, 64, masked=True, options={"hard": True}),
    "rank-over-a-block": Case((33,), 80, 2, 144, biases=True),
    "experts-only": Case((33,), 80, 1, 4, shared=False),
    "shared-only": Case((33,), 80, experts=None, residual=True),
}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


class Setting:
    """A call with S, V and p given, and the same tensors in float64 for the equations."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, seed: int | None = 7) -> None:
        arguments = case.make(dtype)
        arguments = {k: v.detach().to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        if case.experts:
            arguments["seed"] = seed
        self.x = prepare(**arguments, backend="triton")
        x, T, E = self.x, self.x.hidden.shape[0], self.x.num_experts
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

        self.s = draw(T, case.d).to(dtype) if case.shared else None
        self.v = draw(T, E * x.rank).to(dtype) if E else None
        self.probs = torch.softmax(draw(T, E), -1).float()
        self.logits = draw(T, E).float()
        self.grad_out = draw(T, case.d).to(dtype)
        self.mask = x.token_mask if x.token_mask is not None else torch.ones(T, dtype=torch.bool, device=device)
        self.used = triton_backend._used_weights(x, self.probs)

        def double(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.double()

        self.equation = {
            "s": double(self.s),
            "v": double(self.v),
            "lora_b": double(x.lora_b),
            "lora_b_bias": double(x.lora_b_bias),
            "weights": self.used.double(),
            "attn_output": x.attn_output.double(),
            "residual": double(x.residual),
            "scale": x.scale,
        }


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """In relative norm, of the whole and of each row against the typical row."""
    assert got.shape == want.shape
    difference = (got.double() - want).reshape(-1, want.shape[-1])
    size = want.norm() + 1e-30
    assert difference.norm() <= TOLERANCE[dtype] * size
    assert difference.norm(dim=-1).max() * difference.shape[0] ** 0.5 <= 8 * TOLERANCE[dtype] * size


def launchers() -> list[str]:
    return ["interpreter", *(pytest.param(family, marks=pytest.mark.slow) for family in families())]


@pytest.fixture(params=launchers())
def launch(request, device) -> Launcher:
    """The configurations of a family; on a GPU only its own."""
    own = triton_backend.launcher(device)
    if request.param == "interpreter":
        return own
    if device.type == "cuda":
        pytest.skip("the tiles of another family needn't fit this GPU")
    return Launcher(request.param, inline_assembly=False)


COVERING = [(name, torch.float32) for name in CASES] + [
    ("ragged", torch.bfloat16),
    ("rank-over-a-block", torch.float16),
]


@pytest.mark.parametrize(("name", "dtype"), COVERING)
def test_fusion_forward(name, dtype, launch, device):
    at = Setting(CASES[name], dtype, device)
    got = fusion_forward.fusion_forward(launch, at.x, at.s, at.v, at.x.lora_b, at.used)
    assert_near(got, fusion_forward.fusion_forward_reference(**at.equation), dtype)


def own_product(launch: Launcher, **changes: int) -> Launcher:
    """The launcher with the rows of our own shared product free of limits that are a choice, and changed."""
    launch = copy.copy(launch)
    rows = drop_limits(launch.table["product_forward"], "candidate", "kept")
    launch.table = launch.table | {"product_forward": [row | changes for row in rows]}
    return launch


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [covered for covered in COVERING if CASES[covered[0]].shared])
def test_product_forward(name, dtype, keep, launch, device):
    assert_product_forward(CASES[name], dtype, keep, own_product(launch), device)


@pytest.mark.parametrize(("strip", "group"), [(16, 3), (64, 1)])
def test_product_forward_by_strips_and_groups(strip, group, device):
    """5 blocks of tokens and 4 of columns: the last group is short, and d ends inside a strip."""
    blocks = {"BLOCK_T": 16, "BLOCK_D": 64, "BLOCK_STRIP": strip}
    launch = own_product(triton_backend.launcher(device), **blocks, GROUP=group)
    assert_product_forward(CASES["ragged"], torch.bfloat16, True, launch, device)


def assert_product_forward(case: Case, dtype: torch.dtype, keep: bool, launch: Launcher, device: torch.device) -> None:
    at = Setting(case, dtype, device)
    x = at.x._replace(keep=keep)
    if not launch.takes("product_forward", x):
        pytest.skip("the family's product_forward doesn't take this call")
    out, s = product_forward.product_forward(launch, x, x.hidden, at.v, x.lora_b, at.used)
    shared_bias = None if x.shared_bias is None else x.shared_bias.double()
    product = {"hidden": x.hidden.double(), "shared_weight": x.shared_weight.double(), "shared_bias": shared_bias}
    others = {name: value for name, value in at.equation.items() if name != "s"}
    assert_near(out, product_forward.product_forward_reference(**product, **others), dtype)
    assert (s is not None) == keep
    if s is not None:
        assert_near(s, F.linear(*product.values()), dtype)


@pytest.mark.parametrize("structure", ["split", "rows"])
@pytest.mark.parametrize(("name", "dtype"), COVERING)
def test_fusion_backward(name, dtype, structure, launch, device):
    at = Setting(CASES[name], dtype, device)
    backward = fusion_backward.FusionBackward(launch, at.x, at.grad_out, at.s, at.v, at.x.lora_b, at.used)
    want = fusion_backward.fusion_backward_reference(at.grad_out.double(), **at.equation)
    asked = {"attn": True, "residual": at.x.residual is not None}
    got = {}
    if structure == "rows":
        if not at.x.num_experts or not launch.takes("row_grad", at.x):
            pytest.skip("the family's row_grad doesn't take this call")
        got["attn_output"], got["residual"], got["s"], partial_d_probs, partial_d_v = backward.stream_and_v(**asked)
        got |= {"probs": partial_d_probs.sum(0), "v": partial_d_v.sum(0)}
    else:
        got["attn_output"], got["residual"], got["s"], partial_d_probs = backward.stream(**asked)
        if at.x.num_experts:
            got |= {"probs": partial_d_probs.sum(0), "v": backward.v().sum(0)}
            partial_d_b, got["lora_b_bias"] = backward.b()
            got["lora_b"] = partial_d_b.sum(0)
    checked = {name for name, value in got.items() if value is not None}
    assert checked >= {"attn_output"} | ({"probs", "v"} if at.x.num_experts else set())
    for result in checked:
        assert got[result].isfinite().all(), result
        assert_near(got[result], want[result], dtype)


@pytest.mark.parametrize("experts", [1, 2, 3, 5])
@pytest.mark.parametrize("programs", [1, 7])
def test_fusion_backward_by_groups_of_experts(experts, programs, device):
    """5 experts, so that the last group of 2 or 3 is short; one program a group, and more than there are blocks."""
    launch = copy.copy(triton_backend.launcher(device))
    row = {"BLOCK_T": 16, "BLOCK_D": 16, "BLOCK_R": 16, "EXPERTS": experts, "PROGRAMS": programs}
    launch.table = launch.table | {"v_grad": [row], "b_grad": [row]}
    at = Setting(Case((33,), 40, 5, 16, biases=True, options={"scale": 4.0}), torch.float32, device)
    backward = fusion_backward.FusionBackward(launch, at.x, at.grad_out, at.s, at.v, at.x.lora_b, at.used)
    want = fusion_backward.fusion_backward_reference(at.grad_out.double(), **at.equation)
    partial_d_b, d_bias = backward.b()
    for result, got in {"v": backward.v().sum(0), "lora_b": partial_d_b.sum(0), "lora_b_bias": d_bias}.items():
        assert_near(got, want[result], torch.float32)


@pytest.mark.parametrize(("rows", "columns", "gap"), [(33, 80, 0), (33, 80, 5), (5, 64, 0), (1, 7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_parts(rows, columns, gap, dtype, launch, device):
    """Of dense rows and of rows with others' columns between them, which stay as they are."""
    at = Setting(CASES["paper"], dtype, device)
    partial = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(1)).to(device)
    whole = torch.full((rows, columns + gap), 7, dtype=dtype, device=device)
    sum_parts.sum_parts(launch, at.x, [(partial, whole[:, :columns])])
    assert torch.equal(whole[:, :columns], sum_parts.sum_parts_reference(partial, dtype))
    assert (whole[:, columns:] == 7).all()


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_several_sums_by_one_launch(count, launch, device):
    """Of unlike parts, shapes and dtypes, some smaller than a block and some of several; none: no launch."""
    at = Setting(CASES["paper"], torch.bfloat16, device)
    launched = []

    class Log(Launcher):
        def __call__(self, kernel, *configuration, **arguments) -> None:
            launched.append(kernel.__name__)
            super().__call__(kernel, *configuration, **arguments)

    launch = copy.copy(launch)
    launch.__class__ = Log
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 129, 80), (5, 3, 70, 9), (1, 2, 130)]
    # whole numbers: exact in any order
    parts = [torch.randint(-9, 9, shape, generator=generator).float().to(device) for shape in shapes[:count]]
    dtypes = torch.bfloat16, torch.float32, torch.float16
    totals = [
        torch.empty(part.shape[1:], dtype=dtype, device=device) for part, dtype in zip(parts, dtypes, strict=False)
    ]
    sum_parts.sum_parts(launch, at.x, list(zip(parts, totals, strict=True)))
    for part, total in zip(parts, totals, strict=True):
        assert torch.equal(total, sum_parts.sum_parts_reference(part, total.dtype))
    assert launched == ["sum_parts_kernel"] * (count > 0)


def test_programs_end_together():
    """As many splits of d as keep the last program of a GPU's 132 from ending late, or those that a row says."""
    assert split({"PROGRAMS": 132}, 32, 4096, 32) == (1024, 4)
    assert split({"PROGRAMS": 132}, 10, 4096, 32) == (320, 13)
    assert split({"PROGRAMS": 132}, 133, 4096, 32) == (512, 8)
    assert split({"PROGRAMS": 132}, 0, 0, 32) == (32, 1)
    assert split({"PROGRAMS": 4}, 1, 40, 16) == (16, 3)
    assert split({"SPLITS": 3}, 133, 4096, 32) == (1376, 3)
    assert split({}, 133, 4096, 32) == (32, 128)
    config = {"PROGRAMS": 4, "BLOCK_D": 16}
    split(config, 1, 40, 16)
    assert config == {"BLOCK_D": 16}


@pytest.mark.parametrize("noise", ["none", "seed", "explicit"])
@pytest.mark.parametrize(
    ("name", "dtype"), [("paper", torch.float32), ("ragged", torch.bfloat16), ("hard", torch.float32)]
)
def test_router(name, dtype, noise, launch, device):
    at = Setting(CASES[name], dtype, device, seed=7 if noise == "seed" else None)
    x = at.x
    drawn = None if noise == "none" else gumbel_noise(7, x.hidden.shape[0], x.num_experts, device)
    if noise == "explicit":
        x = x._replace(gumbel=drawn)
    bias = None if x.router_bias is None else x.router_bias.double()
    want = router.route_reference(
        x.hidden.double(), x.router_weight.double(), bias, drawn, x.tau, x.hard, at.mask.double()
    )
    for got, expected in zip(router.route(launch, x, x.hidden), want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6)


def test_router_of_a_wide_layer(device, truncating_products):
    """The error that truncated sums make grows with d: one chain of them over d is far from that of float32."""
    at = Setting(Case((64,), 4096, 3, 1, shared=False), torch.float16, device, seed=None)
    x = at.x

    def equation(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return router.route_reference(
            x.hidden.to(dtype), x.router_weight.to(dtype), None, None, x.tau, x.hard, at.mask.to(dtype)
        )

    results = zip(
        router.route(triton_backend.launcher(device), x, x.hidden),
        equation(torch.float32),
        equation(torch.float64),
        strict=True,
    )
    for got, of_float32, want in results:
        assert (got - want).norm() <= 2 * (of_float32 - want).norm() + torch.finfo(torch.float32).eps * want.norm()


@pytest.mark.parametrize("absent", [(), ("load",), ("probs", "router_prob"), ("probs", "load", "router_prob")])
@pytest.mark.parametrize("name", ["paper", "ragged"])
def test_router_backward(name, absent, launch, device):
    at = Setting(CASES[name], torch.float32, device)
    T, E = at.probs.shape
    given = {
        "probs": torch.randn(3, T, E, device=device),
        "load": torch.randn(E, device=device),
        "router_prob": torch.randn(E, device=device),
    }
    given |= dict.fromkeys(absent)
    got = router.route_backward(launch, at.x, at.probs, at.logits, *given.values())
    d_probs, grad_load, grad_router_prob = (
        torch.zeros(E, dtype=torch.float64, device=device) if value is None else value.double()
        for value in given.values()
    )
    want = router.route_backward_reference(
        d_probs.sum(0) if d_probs.ndim == 3 else d_probs, at.probs.double(), at.logits.double(),
        grad_load, grad_router_prob, at.mask.double(), at.x.tau,
    )  # fmt: skip
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    # beside the gradient of V, and zeros up to whole 16 bytes
    d_rows = torch.full((T, 4 + E + 3), 7, dtype=torch.bfloat16, device=device)
    again = router.route_backward(launch, at.x, at.probs, at.logits, *given.values(), d_rows[:, 4:])
    assert torch.equal(again, got)
    assert torch.equal(d_rows[:, 4 : 4 + E], got.bfloat16())
    assert (d_rows[:, :4] == 7).all()
    assert not d_rows[:, 4 + E :].any()


@pytest.mark.parametrize(
    ("name", "dtype"), [("paper", torch.float32), ("ragged", torch.bfloat16), ("hard", torch.float16)]
)
def test_router_weight_grad(name, dtype, launch, device):
    """In float32 whatever h's dtype, gradients below float16's smallest number too; rows without one aren't read."""
    x = Setting(CASES[name], dtype, device, seed=None).x
    T, E = x.hidden.shape[0], x.num_experts
    d_logits = torch.randn(T, E, generator=torch.Generator().manual_seed(1)).to(device) * 1e-9
    d_logits[5] = 0
    want = d_logits.double().T @ x.hidden.double()
    hidden = x.hidden.clone()
    hidden[5] = float("nan")
    got = router_weight_grad.router_weight_grad(launch, x, d_logits, hidden).sum(0)
    assert got.dtype == torch.float32
    assert_near(got, want, torch.float32)


def test_a_tie_goes_to_the_first_expert(device):
    """As `torch.argmax` decides it, in the load and in the fusion's weights alike."""
    at = Setting(CASES["hard"], torch.float32, device, seed=None)
    x = at.x._replace(router_weight=torch.zeros_like(at.x.router_weight))
    _, probs, load, _ = router.route(triton_backend.launcher(device), x, x.hidden)
    # 1 within a rounding: a GPU divides by the tokens approximately
    torch.testing.assert_close(load.cpu(), torch.eye(5)[0], rtol=1e-6, atol=0)
    assert torch.equal(triton_backend._used_weights(x, probs), torch.eye(5, device=device)[:1].expand(33, -1))


class Traffic(Launcher):
    """Counts the bytes of the tensors that kernels are given, without launching."""

    def __init__(self, family: str) -> None:
        super().__init__(family, inline_assembly=False)
        self.bytes: dict[str, int] = {}

    def __call__(self, kernel, grid, config, **arguments) -> None:
        tensors = (value for value in arguments.values() if isinstance(value, Tensor))
        self.bytes[kernel.__name__] = sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@pytest.mark.parametrize("residual", [False, True])
def test_costs_count_every_tensor_once(residual, device):
    """At one block a dimension nothing is a partial sum, so what a launch is given is what it must move."""
    T, d, E, r = 16, 32, 3, 8
    at = Setting(Case((T,), d, E, r, residual=residual), torch.bfloat16, device, seed=None)
    launch = Traffic("interpreter")
    fusion_forward.fusion_forward(launch, at.x, at.s, at.v, at.x.lora_b, at.used)
    backward = fusion_backward.FusionBackward(launch, at.x, at.grad_out, at.s, at.v, at.x.lora_b, at.used)
    backward.stream(attn=True, residual=residual)
    backward.stream_and_v(attn=True, residual=residual)
    backward.v()
    backward.b()
    for keep in (False, True):
        x = at.x._replace(keep=keep)
        product_forward.product_forward(own_product(launch), x, x.hidden, at.v, x.lora_b, at.used)
        cost = product_forward.product_forward_cost(T, d, E, r, residual=residual, kept=keep)
        assert launch.bytes.pop("product_forward_kernel") == cost.bytes
    costs = {
        "fusion_forward_kernel": fusion_forward.fusion_forward_cost,
        "stream_grad_kernel": fusion_backward.stream_grad_cost,
        "row_grad_kernel": fusion_backward.row_grad_cost,
        "v_grad_kernel": fusion_backward.v_grad_cost,
        "b_grad_kernel": fusion_backward.b_grad_cost,
    }
    assert launch.bytes == {name: cost(T, d, E, r, residual=residual).bytes for name, cost in costs.items()}
    router.route(launch, at.x, at.x.hidden)
    sums = (2 * E + 2 * E + 2 * E) * 4
    assert launch.bytes["router_kernel"] == router.route_cost(T, d, E).bytes + 2 * E * 4
    assert launch.bytes["token_mean_kernel"] == sums - 2 * E * 4
    router.route_backward(launch, at.x, at.probs, at.logits, at.probs[None], None, None)
    assert launch.bytes["router_backward_kernel"] == router.route_backward_cost(T, E, 1).bytes
    parts = router_weight_grad.router_weight_grad(launch, at.x, at.logits, at.x.hidden)
    assert launch.bytes["router_weight_grad_kernel"] == router_weight_grad.router_weight_grad_cost(T, d, E).bytes
    d_b, d_weight = torch.empty_like(at.x.lora_b), torch.empty_like(at.x.router_weight)
    sum_parts.sum_parts(launch, at.x, [(torch.zeros(2, *d_b.shape, device=device), d_b), (parts, d_weight)])
    cost = sum_parts.sum_parts_cost((2, E * d * r, 2), (1, E * d, 2))
    assert launch.bytes["sum_parts_kernel"] == cost.bytes


def test_rows_are_for_a_compiler(monkeypatch, tmp_path):
    row = {"BLOCK_T": 32, "BLOCK_D": 64, "num_warps": 4, "num_stages": 1}
    rows = [row | {"before_triton": "3.9"}, row | {"BLOCK_T": 16, "from_triton": "3.9"}, row | {"BLOCK_T": 8}]
    shipped = load_table("sm_90")
    (tmp_path / "sm_90.json").write_text(json.dumps(shipped | {"sum_parts": rows}))
    monkeypatch.setenv("HYCAM_KERNELS_TABLES", str(tmp_path))
    for version, block in {"3.6.0": 32, "3.8.2+git1": 32, "3.9.0": 16, "3.10.0": 16, "4.0": 16}.items():
        monkeypatch.setattr(config_tables, "_triton_version", lambda version=version: version)
        taken = load_table.__wrapped__("sm_90")["sum_parts"]
        assert taken == [row | {"BLOCK_T": block}, row | {"BLOCK_T": 8}]


@pytest.mark.parametrize("version", ["3.6.0", "3.8.0", "3.9.0"])
@pytest.mark.parametrize("family", [*families(), "interpreter"])
def test_every_table_takes_every_call(family, version, monkeypatch):
    monkeypatch.setattr(config_tables, "_triton_version", lambda: version)
    launcher = Launcher(family, inline_assembly=False)
    table = launcher.table = load_table.__wrapped__(family)
    for dtype, tokens, rank in itertools.product((torch.bfloat16, torch.float16, torch.float32), (1, 10**6), (1, 256)):
        x = prepare(**Case((1,), 16, 1, 1).make(dtype))
        x = x._replace(hidden=torch.empty(tokens, 1, dtype=dtype, device="meta"))
        x = x._replace(lora_b=torch.empty(16, 1, rank, dtype=dtype, device="meta"))
        for kernel in table:
            if kernel in OPTIONAL and not launcher.takes(kernel, x):
                continue
            config = launcher.config(kernel, x)
            assert all(isinstance(value, int) and value > 0 for value in config.values())
            assert config.get("BLOCK_R", 16) >= 16
