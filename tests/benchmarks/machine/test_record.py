"""The committed record holds together: what is counted is what the calls must compute, and the pages show it."""

import re

import pytest

from benchmarks.machine import pages
from benchmarks.machine.assumptions import GPUS
from benchmarks.machine.bounds import whole
from benchmarks.machine.builds import differences, identity
from benchmarks.machine.record import RECORD, load, write
from benchmarks.op.shapes import TRAINING, Shape, flops
from benchmarks.tables import PAGES

FUSED = ("fusion_forward_kernel", "stream_grad_kernel", "row_grad_kernel", "v_grad_kernel", "b_grad_kernel")
FUSED = (*FUSED, "product_forward_kernel")


@pytest.fixture(scope="module")
def record() -> dict:
    return load()


def launches(record: dict):
    builds = {(build["target"], build["build"]): build for build in record["builds"]}
    for call in record["calls"]:
        for launch in call["launches"]:
            yield call, launch, builds[call["target"], launch["build"]]


def test_every_target_has_builds_and_every_gpu_its_calls(record):
    assert {build["target"] for build in record["builds"]} == {*GPUS, "gfx942"}
    assert {call["target"] for call in record["calls"]} == set(GPUS)
    assert all(build["build"] == identity(build["kernel"], build["config"]) for build in record["builds"])


def test_the_products_that_are_counted_are_those_that_the_kernels_must_make(record):
    """Turns, grids and matrix instructions together: whole blocks do a little more, nothing does less."""
    checked = 0
    for call, launch, build in launches(record):
        if launch["kernel"] in FUSED and call["shape"]["tokens"] == 8192:
            asked = whole([part["counts"] for part in build["parts"]], launch["turns"])
            made = launch["programs"] * sum(asked[name] for name in ("HMMA", "HGMMA", "UTCHMMA"))
            assert 0.999 < 2 * made / launch["flops"] < 1.03, (call["target"], launch)
            checked += 1
    assert checked > 5 * len(GPUS)


def test_a_sigmoid_is_one_special_function_in_every_fused_kernel(record):
    """In bfloat16, by tanh; index arithmetic needs a few, and 8 warps along a row's features would make each twice."""
    for call, launch, build in launches(record):
        if launch["kernel"] in FUSED and call["shape"]["tokens"] == 8192:
            asked = whole([part["counts"] for part in build["parts"]], launch["turns"])
            least = launch["sigmoids"]
            assert 0.999 * least <= launch["programs"] * asked["special"] < 1.6 * least, (call["target"], launch)


def test_what_is_asked_of_memory_is_no_less_than_what_must_be_moved(record):
    for call, launch, build in launches(record):
        asked = whole([part["counts"] for part in build["parts"]], launch["turns"])
        assert launch["programs"] * asked["global"] >= 0.99 * launch["bytes"], (call["target"], launch)


def test_a_call_s_products_are_the_op_s(record):
    """The library's and the kernels' together: the floor's, Z once more for the gradient of B and where V's gradient is
    a kernel of its own, N A twice and its gradients, and the columns of zeros beside the logits."""
    for call in record["calls"]:
        if call["call"] == "training":
            shape = Shape(**call["shape"])
            low_rank = shape.num_experts * shape.rank
            again = sum(launch["kernel"] in ("b_grad_kernel", "v_grad_kernel") for launch in call["launches"])
            more = again * 2 * shape.tokens * shape.d * low_rank + 4 * 2 * low_rank * shape.rank * shape.d
            more += 2 * shape.tokens * shape.d * (-(low_rank + shape.num_experts) % 8)
            made = sum(one["flops"] for one in (*call["operations"], *call["launches"]))
            assert made == flops(shape, "both") + more


def test_peers_compute_as_much_and_torch_compile_moves_less_than_plain_pytorch(record):
    for shape in TRAINING:
        found = {entry["peer"]: entry for entry in record["peers"] if entry["shape"] == shape.as_dict()}
        eager, inductor = (found[name]["operations"] for name in ("eager", "inductor"))
        assert sum(one["flops"] for one in eager) == pytest.approx(sum(one["flops"] for one in inductor), rel=0.01)
        assert sum(one["bytes"] for one in inductor) < sum(one["bytes"] for one in eager)
        assert sum(one["count"] for one in inductor) < sum(one["count"] for one in eager)


def test_the_pages_show_every_table_once():
    names = [name for page in PAGES for name in re.findall(r"<!-- table: (counts-[\w-]+) -->", page.read_text())]
    assert sorted(names) == sorted(pages.TABLES)


def test_a_table_says_that_it_is_counted_and_from_what(record):
    for name in pages.TABLES:
        shown = pages.draw(name, RECORD)
        assert shown.endswith(f"torch {record['torch']}.")
        assert "By count, on paper, from `benchmarks/results/counts.json`" in shown
        assert len(shown.splitlines()) > 4


def test_differences_name_the_kernel_and_both_numbers(record):
    (before,) = record["builds"][:1]
    grown = {**before, "registers": before["registers"] + 8}
    (line,) = differences([before], [grown])
    assert line.startswith(f"{before['target']} {before['kernel']} (")
    assert line.endswith(f"registers grew from {before['registers']} to {before['registers'] + 8}")
    assert "fell" in next(differences([grown], [before]))
    assert next(differences([], [before])).endswith("is not in the record")
    assert next(differences([before], [])).endswith("is no longer built")
    assert not list(differences([before], [before]))


def test_a_record_is_written_as_it_is_read(record, tmp_path):
    write(tmp_path / "counts.json", record)
    assert (tmp_path / "counts.json").read_text() == RECORD.read_text()
