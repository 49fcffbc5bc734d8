"""The loops of the source meet those of the code, also where the compiler made others of them."""

import pytest

from benchmarks.machine.turns import Loop, turns


def parts(*loops: dict[str, int]) -> list[dict]:
    return [{"inside": None, "counts": {"issue": 9}}, *({"inside": 0, "counts": counts} for counts in loops)]


def test_a_loop_runs_as_often_as_its_source_says():
    assert turns([Loop(5), Loop(64)], parts({"HGMMA": 8}, {"special": 4})) == [1, 5, 64]
    assert turns([], parts()) == [1]


def test_of_an_unrolled_loop_a_turn_is_several():
    assert turns([Loop(128, bytes=4096), Loop(128)], parts({"global": 16384}, {"global": 28672})) == [1, 32, 128]
    assert turns([Loop(128, bytes=4096)], parts({"global": 4224})) == [1, 128]


def test_the_turns_that_are_left_may_be_a_loop_behind_it():
    code = parts({"global": 8192}, {"global": 2048})
    assert turns([Loop(7, bytes=2048)], code) == [1, 1, 3]
    assert turns([Loop(64, bytes=2048)], code) == [1, 16, 0]
    assert turns([Loop(7, bytes=2048), Loop(3)], [*code, *parts({"HMMA": 1})[1:]]) == [1, 1, 3, 3]


def test_a_loop_that_is_unrolled_as_a_whole_leaves_nothing():
    assert turns([Loop(5, constant=True)], parts()) == [1]
    assert turns([Loop(5, constant=True)], parts({"HGMMA": 8})) == [1, 5]
    assert turns([Loop(64), Loop(5, constant=True)], parts({"HMMA": 8})) == [1, 64]


def test_the_last_turn_of_a_pipelined_tcgen05_product_stands_behind_the_loop():
    assert turns([Loop(5), Loop(8)], parts({"UTCHMMA": 8}, {"HMMA": 4})) == [1, 4, 8]


def test_a_program_runs_one_of_several_branches():
    code = parts({"global": 8}, {"global": 8})
    assert turns([Loop(8, 0.75), Loop(6, 0.25)], code, branches=2) == [0.5, 6, 1.5]


def test_a_loop_of_some_programs_counts_by_their_share():
    assert turns([Loop(8, 0.75), Loop(8, 0.25)], parts({"HMMA": 8}, {"HMMA": 8})) == [1, 6, 2]


@pytest.mark.parametrize("loops", [[], [Loop(5), Loop(5)]])
def test_code_with_other_loops_is_refused(loops):
    with pytest.raises(ValueError, match=f"has 1 loops, its source {len(loops)}"):
        turns(loops, parts({"HMMA": 8}))
