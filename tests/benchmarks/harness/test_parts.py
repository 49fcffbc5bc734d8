"""Each part of a call's time is found where it belongs: work of one kind has its time in one part."""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from benchmarks.harness.parts import PARTS, measure_parts, prepare
from benchmarks.harness.timing import Work
from benchmarks.op.floor import PRODUCTS, measure_profile
from benchmarks.op.shapes import Shape
from hycam_kernels.backends.cpu import library, passes
from tests.benchmarks.fakes import make_session

X = torch.randn(512, 512)
BATCH = torch.randn(4, 256, 256)
LEAF = torch.randn(512, 512, requires_grad=True)
ROWS = torch.randn(2048, 512)
STRIDED = torch.randn(4, 256, 256)[:, ::2, ::2]


def work_of(run: Callable[[], object]) -> Work:
    return Work(lambda i: i, lambda _: run(), 1)


class Sleeps(torch.autograd.Function):
    """Of which torch's profiler has an event that encloses Python."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(0.01)
        return x.clone()


def medians(run: Callable[[], object]) -> dict[str, float]:
    sample = prepare(work_of(run))
    samples = [sample() for _ in range(3)]
    for one in samples:
        assert one["products"] + one["other"] <= one["profiled"], "nothing is counted twice"
    return {name: statistics.median(one[name] for one in samples) for name in samples[0]}


@pytest.mark.parametrize(
    ("part", "run"),
    [
        ("products", lambda: X @ X),
        ("products", lambda: torch.mm(X, X.T, out=torch.empty_like(X))),
        ("products", lambda: torch.empty_like(X).addmm_(X, X, beta=0)),
        ("products", lambda: functional.linear(X, X, X[0])),
        ("products", lambda: torch.baddbmm(BATCH, BATCH, BATCH)),
        ("products", lambda: torch.autograd.grad(X @ LEAF, LEAF, X)),
        ("other", lambda: X.sin().cos_()),
        ("other", lambda: ROWS.T.contiguous()),
        ("native", lambda: [passes.sum_tokens(ROWS) for _ in range(8)]),
    ],
    ids=["operator", "out", "in-place", "linear", "batched", "backward", "element-wise", "copies", "native"],
)
def test_work_of_one_kind_is_in_one_part(part, run):
    if part == "native" and library.refusal():
        pytest.skip(library.refusal())
    found = medians(run)
    rest = {name: found[name] for name in PARTS if name != part}
    assert found[part] > 4 * sum(rest.values()), found
    if part != "products":
        assert found["products"] == 0
    if part != "native":
        assert found["native"] == 0


def test_a_copy_that_a_product_makes_is_of_the_product():
    found = medians(lambda: torch.bmm(STRIDED, STRIDED))
    assert found["products"] > 0
    assert found["other"] == 0


@pytest.mark.parametrize("run", [lambda: time.sleep(0.01), lambda: Sleeps.apply(LEAF[:2, :2])])
def test_what_python_does_is_in_no_part(run):
    found = medians(run)
    assert sum(found[part] for part in PARTS) < 5_000
    assert min(found["call"], found["profiled"]) > 10_000


def test_the_op_beside_its_products(tmp_path):
    """On one thread; the products alone have none of the library's passes, and the op has all three."""
    before, threads = torch.get_num_threads(), []
    session = make_session(tmp_path / "r.json", rounds=3)
    measure_profile(session, Shape(64, 32, 3, 4), torch.float32, seconds=1)
    products, op = session.record.entries
    assert (products["peer"], op["peer"]) == (PRODUCTS, "torch")
    for entry in (products, op):
        assert (entry["group"], entry["threads"], entry["method"]) == ("profile", 1, "host")
        assert [len(entry[name]) for name in ("samples_us", "profiled_us")] == [3, 3]
        assert {part: len(samples) for part, samples in entry["parts_us"].items()} == dict.fromkeys(PARTS, 3)
        assert min(entry["parts_us"]["products"]) > 0
    assert not any(products["parts_us"]["native"])
    assert all(op["parts_us"]["native"]) == (library.refusal() is None)
    measure_parts(session, Shape(1, 1), {}, {"one": lambda: work_of(lambda: threads.append(torch.get_num_threads()))})
    assert set(threads) == {1}
    assert torch.get_num_threads() == before


@pytest.mark.skipif(library.refusal() is not None, reason="the native passes aren't here")
def test_what_a_pass_leaves_to_torch_is_torchs():
    """Of the noise the logarithms: the least times, which other processes change least."""
    sample = prepare(work_of(lambda: passes.gumbel_noise(3, 4096, 64)))
    samples = [sample() for _ in range(12)]
    least = {name: min(one[name] for one in samples) for name in samples[0]}
    assert 0 < least["native"] < 0.85 * least["call"]
    assert least["other"] > 0.1 * least["call"]
