"""The arithmetic of the bounds, with numbers that can be worked out by hand."""

import pytest

from benchmarks.machine.assumptions import GPUS, Gpu
from benchmarks.machine.bounds import clocks, launch_bound, operation_us, resident, whole

# 10 multiprocessors at 1 GHz, 100 TFLOP/s and 1 TB/s of the data sheet
GPU = Gpu("a GPU", 10, 1.0, 100, 1.0, 16, {"HGMMA": 2048, "HMMA": 1024}, 2048, 32, 228 * 1024)


def build(**parts: dict[str, int]) -> dict:
    rows = [{"inside": None if name == "outside" else 0, "counts": counts} for name, counts in parts.items()]
    return {"registers": 128, "shared_bytes": 32768, "warps": 4, "parts": rows}


def test_counts_become_clocks_of_a_multiprocessor():
    """The fusion's turn on sm_90: 64 x 64 elements, two special functions each, and products of depth 64."""
    counts = {"issue": 4 * 358, "special": 2 * 64 * 64, "HGMMA": 64 * 64 * 64, "shared": 16384}
    assert clocks(counts, GPU) == {"issue": 358, "special": 512, "tensor": 128, "shared": 128}
    assert clocks({"HMMA": 1024, "HGMMA": 2048}, GPU)["tensor"] == 2


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "held"),
    [
        (128, 0, 4, 4),  # 128 x 128 registers of 65,536
        (127, 0, 4, 4),  # a warp's registers come in units of 256
        (129, 0, 4, 3),
        (32, 32768, 4, 6),  # 33 KiB of 228
        (16, 0, 1, 32),  # no more programs
        (16, 0, 4, 16),  # no more threads
        (255, 200 * 1024, 8, 1),
    ],
)
def test_registers_shared_memory_threads_and_slots_limit_what_is_held(registers, shared, warps, held):
    assert resident(registers, shared, warps, GPU) == held


def test_a_program_is_its_parts_as_often_as_they_run():
    assert whole([{"issue": 10, "special": 1}, {"issue": 3}, {"issue": 2}], [1, 5, 2.5]) == {"issue": 30, "special": 1}
    with pytest.raises(ValueError):
        whole([{"issue": 10}], [1, 5])


def test_the_multiprocessor_with_one_program_more_sets_the_time():
    one = build(outside={"issue": 4000}, loop={"special": 1600})
    launch = {"programs": 10, "turns": [1, 5], "bytes": 0}
    bound = launch_bound(one, launch, GPU)
    assert bound.clocks == {"issue": 1000, "special": 500, "tensor": 0, "shared": 0}
    assert bound.us["issue"] == pytest.approx(1.0)
    assert (bound.pipe, bound.time) == ("issue", bound.us["issue"])
    assert (bound.resident, bound.waves) == (4, 0.25)
    assert launch_bound(one, launch | {"programs": 11}, GPU).time == pytest.approx(2.0)


def test_what_is_asked_of_l2_and_device_memory_is_the_whole_grid_s():
    one = build(outside={"global": 1600, "issue": 4})
    bound = launch_bound(one, {"programs": 1000, "turns": [1], "bytes": 900_000}, GPU)
    assert bound.us["L2"] == pytest.approx(1e6 * 1600 * 1000 / (16 * 10 * 1e9))
    assert bound.us["HBM"] == pytest.approx(1.0)  # 0.9 of 1 TB/s
    assert bound.pipe == "L2"


def test_an_operation_of_the_library_takes_its_arithmetic_or_its_bytes():
    assert operation_us({"flops": 80e6, "bytes": 9}, GPU) == pytest.approx(1.0)  # 0.8 of 100 TFLOP/s
    assert operation_us({"flops": 80e6, "bytes": 1_800_000}, GPU) == pytest.approx(2.0)


def test_the_assumed_rates_are_those_of_the_data_sheets():
    """Multiply-adds a clock are the data sheet's product rate, within the clock that it is given for."""
    for gpu in GPUS.values():
        rate = 2e9 * max(gpu.multiply_adds.values()) * gpu.multiprocessors * gpu.clock
        assert rate == pytest.approx(1e12 * gpu.products, rel=0.05), gpu.name
    assert GPUS["sm_90"].flops_per_s == pytest.approx(790e12, rel=0.01)
    assert GPUS["sm_90"].bytes_per_s == pytest.approx(4.3e12, rel=0.01)
