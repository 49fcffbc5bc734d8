"""The tuner: what it measures, what it refuses, and the table that it writes."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness.record import Budget
from benchmarks.op import structures
from benchmarks.op.candidates import search
from benchmarks.op.shapes import TRAINING, Shape
from benchmarks.op.structures import forward_forms, measure_structures
from hycam_kernels import tune as command
from hycam_kernels.backends.triton import config_tables as tables
from hycam_kernels.backends.triton import tuning as tune
from hycam_kernels.backends.triton.config_tables import launch_parameters, load_table, select
from hycam_kernels.backends.triton.tuned_table import table_text, winners
from hycam_kernels.backends.triton.tuning import Measurement, Size, Tuner, make_call, neighbours
from tests.benchmarks.fakes import make_session
from tests.kernels.backends.triton.conftest import INTERPRETING

SMALL, LARGE = Size(2400, 64, 2, 16), Size(8192, 64, 2, 16)
ROW = {"BLOCK_T": 64, "BLOCK_D": 64, "num_warps": 4, "num_stages": 2}
WIDE = ROW | {"BLOCK_D": 128}
TABLE = {"fusion_forward": [{"dtypes": ["bfloat16"], "max_tokens": 4096} | ROW, ROW], "router": [{"BLOCK_T": 32}]}


def measured(times: dict[tuple[Size, int], float], rows=(ROW, WIDE)) -> list[Measurement]:
    """``times``: by size and index of the row."""
    return [Measurement("fusion_forward", "forward", size, rows[i], median_us=t) for (size, i), t in times.items()]


def chosen(table, tokens, dtype=torch.bfloat16, rank=16):
    return launch_parameters(
        table["fusion_forward"][select(table, "fusion_forward", dtype, tokens, 4096, num_experts=5, rank=rank)]
    )


def test_neighbours_change_one_number():
    found = list(neighbours(ROW | {"BLOCK_R": 64, "SPLITS": 3}))
    assert len(found) == len({json.dumps(row) for row in found}) == 10
    for row in found:
        assert row["BLOCK_R"] == 64
        assert sum(row[name] != value for name, value in (ROW | {"SPLITS": 3}).items()) == 1


def test_a_switch_is_turned():
    assert [row["PDL"] for row in neighbours({"PDL": True})] == [False]


def test_each_range_of_tokens_gets_its_winner():
    table = winners(measured({(SMALL, 0): 10, (SMALL, 1): 5, (LARGE, 0): 10, (LARGE, 1): 20}), TABLE)
    assert [chosen(table, tokens) for tokens in (100, 2400, 4096)] == [WIDE] * 3
    assert [chosen(table, tokens) for tokens in (4097, 8192, 100_000)] == [ROW] * 2 + [ROW]
    assert table["router"] == TABLE["router"]


def test_winners_leave_other_dtypes_and_ranks_alone():
    table = winners(measured({(SMALL, 0): 10, (SMALL, 1): 5}), TABLE)
    assert chosen(table, 2400) == WIDE
    assert chosen(table, 2400, dtype=torch.float32) == ROW
    assert chosen(table, 2400, rank=17) == ROW


def test_a_winner_of_all_ranges_is_one_row():
    table = winners(measured({(SMALL, 0): 10, (SMALL, 1): 5, (LARGE, 0): 10, (LARGE, 1): 5}), TABLE)
    assert len(table["fusion_forward"]) == 3
    assert [chosen(table, tokens) for tokens in (100, 100_000)] == [WIDE] * 2


def test_sizes_of_a_range_are_weighed_together():
    """WIDE wins by a factor of 2 at one size and loses by 4 at the other."""
    other = SMALL._replace(d=128)
    table = winners(measured({(SMALL, 0): 10, (other, 0): 1, (SMALL, 1): 5, (other, 1): 4}), TABLE)
    assert chosen(table, 2400) == ROW


@pytest.mark.parametrize("time", [9.95, 10.0, 11.0])
def test_a_gain_within_the_noise_changes_nothing(time):
    assert chosen(winners(measured({(SMALL, 0): 10, (SMALL, 1): time}), TABLE), 2400) == ROW


def test_what_was_refused_or_not_measured_everywhere_can_not_win():
    refused = Measurement("fusion_forward", "forward", SMALL, WIDE, refusal="spills registers")
    assert chosen(winners([*measured({(SMALL, 0): 10}), refused], TABLE), 2400) == ROW
    partly = measured({(SMALL, 0): 10, (SMALL._replace(d=128), 0): 10, (SMALL, 1): 1})
    assert chosen(winners(partly, TABLE), 2400) == ROW


ROWS_TABLE = {
    "row_grad": [{"dtypes": ["bfloat16"], "min_rank": 9, "max_rank": 64, "max_tokens": 4096} | ROW],
    "stream_grad": [ROW],
}


def of_row_grad(times: dict[str, float]) -> list[Measurement]:
    rows = {"present": ROW, "wide": WIDE, "left out": tune.LEFT_OUT}
    return [Measurement("row_grad", "backward", SMALL, rows[name], median_us=time) for name, time in times.items()]


def test_an_optional_kernel_that_is_better_left_out_goes():
    assert "row_grad" not in winners(of_row_grad({"present": 10, "wide": 9, "left out": 5}), ROWS_TABLE)


def test_an_optional_kernel_that_stays_keeps_its_limits():
    first, *rest = winners(of_row_grad({"present": 10, "wide": 5, "left out": 9}), ROWS_TABLE)["row_grad"]
    assert first == {"dtypes": ["bfloat16"], "min_rank": 9, "max_rank": 16} | WIDE
    assert rest == ROWS_TABLE["row_grad"]
    unchanged = winners(of_row_grad({"present": 10, "wide": 9.95, "left out": 9.95}), ROWS_TABLE)["row_grad"]
    assert launch_parameters(unchanged[0]) == ROW


CANDIDATE = {"candidate": True, "dtypes": ["bfloat16"], "kept": False, "max_rank": 32}
FORMS_TABLE = {"fusion_forward": [ROW], "product_forward": [CANDIDATE | ROW]}


def of_product_forward(times: dict[str, float]) -> list[Measurement]:
    rows = {"candidate": ROW, "wide": WIDE, "left out": tune.LEFT_OUT}
    return [
        Measurement("product_forward", tune.NOT_KEPT, SMALL, rows[name], median_us=time) for name, time in times.items()
    ]


def test_a_candidate_that_wins_takes_its_calls():
    """Those within its limits, that don't keep S; and only by more than the noise."""
    table = winners(of_product_forward({"left out": 10, "candidate": 9, "wide": 5}), FORMS_TABLE)
    first, *rest = table["product_forward"]
    assert first == {"dtypes": ["bfloat16"], "kept": False, "max_rank": 16} | WIDE
    assert rest == FORMS_TABLE["product_forward"]
    assert select(table, "product_forward", torch.bfloat16, *SMALL, kept=False) == 0
    assert select(table, "product_forward", torch.bfloat16, *SMALL, kept=True) is None
    left = winners(of_product_forward({"left out": 10, "candidate": 9.95, "wide": 20}), FORMS_TABLE)
    assert left == FORMS_TABLE


def test_a_winner_of_before_can_lose_again():
    before = winners(of_product_forward({"left out": 10, "candidate": 9, "wide": 5}), FORMS_TABLE)
    assert winners(of_product_forward({"left out": 5, "wide": 9}), before) == FORMS_TABLE
    kept = winners(of_product_forward({"left out": 4.99, "wide": 5}), before)
    assert launch_parameters(kept["product_forward"][0]) == WIDE


def test_tuning_again_replaces_the_rows_of_before():
    once = winners(measured({(SMALL, 0): 10, (SMALL, 1): 5}), TABLE)
    twice = winners(measured({(SMALL, 0): 5, (SMALL, 1): 10}, rows=(ROW, WIDE)), once)
    assert chosen(twice, 2400) == ROW
    assert len(twice["fusion_forward"]) == len(once["fusion_forward"])


def test_a_table_of_ones_own_goes_before_the_shipped_one(tmp_path, monkeypatch):
    table = winners(measured({(SMALL, 0): 10, (SMALL, 1): 5}), load_table("sm_90"))
    (tmp_path / "sm_90.json").write_text(table_text(table))
    shipped = load_table("sm_80")
    monkeypatch.setenv("HYCAM_KERNELS_TABLES", str(tmp_path))
    tables.load_table.cache_clear()
    assert load_table("sm_90") == table
    assert load_table("sm_80") == shipped
    monkeypatch.setenv("HYCAM_KERNELS_TABLES", str(tmp_path / "nowhere"))
    tables.load_table.cache_clear()
    with pytest.raises(ValueError, match=r"HYCAM_KERNELS_TABLES .*nowhere"):
        load_table("sm_90")
    of_before = {kernel: rows for kernel, rows in table.items() if kernel not in ("sum_parts", "row_grad")}
    of_before["b_grad"] = [{"BLOCK_T": 64}]
    (tmp_path / "sm_90.json").write_text(table_text(of_before))
    monkeypatch.setenv("HYCAM_KERNELS_TABLES", str(tmp_path))
    tables.load_table.cache_clear()
    with pytest.raises(ValueError, match=r"sm_90.json has no sum_parts, no EXPERTS in a row of b_grad"):
        load_table("sm_90")
    monkeypatch.delenv("HYCAM_KERNELS_TABLES")
    tables.load_table.cache_clear()
    assert load_table("sm_90") != table


def test_shipped_tables_are_written_as_the_tuner_writes():
    assert json.loads(table_text(load_table("sm_90"))) == load_table("sm_90")


@pytest.fixture
def tuner(device) -> Tuner:
    """Of the real backend, with times that fall from one measurement to the next."""
    times = itertools.count(1000.0, -1.0)

    def measure(run) -> float:
        run()
        return next(times)

    family = tables.INTERPRETER if INTERPRETING else tables.family_of(device)
    return Tuner(load_table(family), measure=measure, inline_assembly=not INTERPRETING)


def call(size: Size, device):
    return make_call(size, torch.float32, device, training=size.tokens > tune.DECODE_TOKENS)


def few(candidates):
    return {kernel: rows[:2] for kernel, rows in candidates.items()}


def of_forward(tuner: Tuner) -> list[Measurement]:
    return [found for found in tuner.found if found.kernel == "fusion_forward"]


def test_every_kernel_of_both_passes_is_measured(tuner, device):
    size = Size(70, 48, 2, 16)
    candidates = few(tuner.candidates([size], lambda s: call(s, device)))
    tuner.run(size, call(size, device), candidates)
    passes = {found.kernel: found.pass_ for found in tuner.found}
    assert passes["fusion_forward"] == passes["router"] == "forward"
    assert passes["b_grad"] == passes["router_backward"] == "backward"
    assert passes.get("product_forward", tune.NOT_KEPT) == tune.NOT_KEPT
    left_out = [found for found in tuner.found if found.row == tune.LEFT_OUT]
    assert {found.kernel for found in left_out} == set(tables.OPTIONAL) & candidates.keys()
    assert len(tuner.found) == sum(map(len, candidates.values())) + len(left_out)
    assert all(found.refusal is None and found.median_us for found in tuner.found)
    assert winners(tuner.found, tuner.table).keys() == tuner.table.keys()


def test_further_rows_come_before_neighbours_where_experts_are_few(tuner, device):
    """With V at hand and without, with one expert a program and several: no single change leads there."""
    tuner.processors = 6
    of_few = tuner.candidates([Size(70, 48, 2, 16)], lambda s: call(s, device))
    for kernel, rows in tune.further(6).items():
        first = [row for row in of_few[kernel] if row in rows]
        assert first == rows, kernel
        assert of_few[kernel].index(rows[-1]) < min(of_few[kernel].index(row) for row in neighbours(of_few[kernel][0]))
        assert {row.get("PROGRAMS", 6) for row in rows} == {6}
    of_many = tuner.candidates([Size(70, 48, 6, 16)], lambda s: call(s, device))
    assert not any(row in of_many["b_grad"] for row in tune.further(6)["b_grad"])


def test_a_row_that_holds_all_experts_takes_no_more_of_them_than_were_measured():
    held = WIDE | {"PROGRAMS": 132}
    table = winners(measured({(SMALL, 0): 10, (SMALL, 1): 5}, rows=(ROW, held)), TABLE)
    assert table["fusion_forward"][0] == {
        "dtypes": ["bfloat16"], "max_rank": 16, "max_experts": 2, "plain": True, "min_rank": 1, **held,
    }  # fmt: skip
    for limits in ({"num_experts": 3}, {"plain": False}, {"rank": 0}):
        sizes = {"tokens": 2400, "d": 4096, "num_experts": 2, "rank": 16} | limits
        assert (
            launch_parameters(table["fusion_forward"][select(table, "fusion_forward", torch.bfloat16, **sizes)]) == ROW
        )


def test_inference_is_measured_at_few_tokens(tuner, device):
    size = Size(4, 48, 2, 16)
    tuner.run(size, call(size, device), few(tuner.candidates([size], lambda s: call(s, device))))
    assert {found.pass_ for found in tuner.found} == {"inference"}
    assert {found.kernel for found in tuner.found} == {"decode_down", "decode_fusion"}
    assert all(found.refusal is None and found.median_us for found in tuner.found)


def test_a_candidate_that_is_wrong_or_fails_is_refused(tuner, device, monkeypatch):
    size = Size(70, 48, 2, 16)
    x = call(size, device)
    row = launch_parameters(tuner.table["fusion_forward"][-1])
    failing = row | {"BLOCK_T": 48}  # no power of 2
    tuner.run(size, x, {kernel: [] for kernel in tuner.table} | {"fusion_forward": [row, failing]})
    right, failed = of_forward(tuner)
    assert right.refusal is None
    assert failed.median_us is None
    assert failed.refusal

    monkeypatch.setattr(tune, "ROUNDING", -1.0)
    tuner.run(size, x, {kernel: [] for kernel in tuner.table} | {"fusion_forward": [row]})
    assert "differs" in of_forward(tuner)[-1].refusal


def test_a_candidate_that_spills_is_refused(tuner, device, monkeypatch):
    size = Size(70, 48, 2, 16)
    row = launch_parameters(tuner.table["fusion_forward"][-1])
    monkeypatch.setattr(tune.RowLauncher, "__call__", spilling(tune.RowLauncher.__call__))
    tuner.run(size, call(size, device), {kernel: [] for kernel in tuner.table} | {"fusion_forward": [row]})
    assert of_forward(tuner)[-1].refusal == "spills registers: {'fusion_forward_kernel': 8}"


def spilling(launch):
    def wrapped(self, kernel, grid, config, **arguments):
        launch(self, kernel, grid, config, **arguments)
        self.spills["fusion_forward_kernel"] = 8

    return wrapped


def test_the_search_records_every_candidate_and_stops_in_time(tuner, device, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "neighbours", lambda row: iter(()))
    monkeypatch.setattr(Tuner, "compile_ahead", lambda self, *arguments, **options: None)
    session = dataclasses.replace(make_session(tmp_path / "r.json"), device=device)
    size = Size(70, 48, 2, 16)
    search(tuner, session, [size], tmp_path / "table.json", torch.float32)
    assert json.loads((tmp_path / "table.json").read_text()).keys() == tuner.table.keys()
    entries = session.record.entries
    assert {entry["kernel"] for entry in entries} == {found.kernel for found in tuner.found}
    assert all(entry["shape"] == Shape(*size).as_dict() and entry["median_us"] for entry in entries)

    ended = Budget(0)
    session.budget = ended
    search(tuner, session, [size], tmp_path / "none.json", torch.float32)
    assert not (tmp_path / "none.json").exists()
    assert "needed" in session.record.entries[-1]["skipped"]


@pytest.mark.skipif(not INTERPRETING, reason="the interpreter's launcher, which has no assembly, is meant")
def test_the_command_tunes_with_the_table_and_assembly_that_calls_use(tmp_path, monkeypatch):
    made = []

    class Noted(Tuner):
        def __init__(self, table, **options) -> None:
            super().__init__(table, **options)
            made.append(self)

        def candidates(self, sizes, calls):
            return {}

    monkeypatch.setattr(command, "Tuner", Noted)
    monkeypatch.setattr(command, "family_of", lambda device: "gfx942")
    monkeypatch.setattr(command, "make_call", lambda *arguments, **options: None)
    monkeypatch.setattr(Tuner, "compile_ahead", lambda *arguments, **options: None)
    monkeypatch.setattr(Tuner, "run", lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=3))
    assert command.main(["--out", str(tmp_path)]) == 0
    (tuner,) = made
    assert tuner.table == load_table(tables.INTERPRETER)
    assert (tuner.inline_assembly, tuner.processors) == (False, 3)


def test_a_search_that_is_broken_off_keeps_what_it_measured(tuner, device, tmp_path, monkeypatch):
    monkeypatch.setattr(Tuner, "compile_ahead", lambda self, *arguments, **options: None)
    session = dataclasses.replace(make_session(tmp_path / "r.json"), device=device)
    times = itertools.count(1.0)

    def measure(run) -> float:
        if (time := next(times)) > 9:
            raise KeyboardInterrupt
        return time

    tuner.measure = measure
    with pytest.raises(KeyboardInterrupt):
        search(tuner, session, [Size(4, 48, 2, 16)], tmp_path / "table.json", torch.float32)
    entries = json.loads((tmp_path / "r.json").read_text())["entries"]
    assert [entry["median_us"] for entry in entries] == list(range(1, 10))
    assert len({entry["kernel"] for entry in entries}) == 2
    assert json.loads((tmp_path / "table.json").read_text()).keys() == tuner.table.keys()


def test_a_structure_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def fail(**operands):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(structures, "ARRANGEMENTS", {"failing": fail, "S and V, joined": structures._products_joined})
    monkeypatch.setattr(structures, "forward_forms", lambda *arguments, **options: {})
    session = make_session(tmp_path / "r.json")
    measure_structures(session, Shape(70, 48, 2, 16), torch.bfloat16, {}, inline_assembly=False)
    failed, measured = session.record.entries
    assert (failed["what"], failed["error"]) == ("failing", "OutOfMemoryError: CUDA out of memory")
    assert (measured["what"], measured["samples_us"]) == ("S and V, joined", [1.0, 2.0, 3.0])


def test_both_forms_of_the_forward_are_timed_where_s_is_kept_and_not(tuner, device, tmp_path):
    session = dataclasses.replace(make_session(tmp_path / "r.json"), device=device)
    measure_structures(session, Shape(70, 48, 2, 16), torch.bfloat16, tuner.table, inline_assembly=not INTERPRETING)
    forms = forward_forms(tuner.table, inline_assembly=not INTERPRETING)
    assert len(forms) == 4
    assert set(forms) < {entry["what"] for entry in session.record.entries}

    x = make_call(Size(70, 48, 2, 16), torch.bfloat16, device, training=True)
    first, *others = [form(x) for form in forms.values()]
    for out in others:
        torch.testing.assert_close(out, first, rtol=tune.ROUNDING, atol=tune.ROUNDING)
    for name, form in forms.items():
        assert ("product_forward" in form.keywords["launch"].asked) == ("own product" in name)


def test_a_table_without_our_own_product_has_one_form(tuner):
    table = {kernel: rows for kernel, rows in tuner.table.items() if kernel != "product_forward"}
    assert list(forward_forms(table, inline_assembly=False)) == [
        "forward, library product, S kept",
        "forward, library product, S not kept",
    ]


@pytest.mark.parametrize("family", tables.families())
@pytest.mark.parametrize("kept", [False, True])
def test_both_forms_can_be_timed_at_every_size(family, kept):
    """The GPU comparison's rows for our own product take its calls, with the limits that are a choice dropped."""
    rows = tables.drop_limits(load_table(family)["product_forward"], "candidate", "kept")
    for shape in TRAINING:
        assert select({"": rows}, "", torch.bfloat16, *shape.as_dict().values(), kept=kept) is not None, shape
