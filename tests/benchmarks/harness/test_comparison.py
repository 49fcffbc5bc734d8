"""The comparison of two records: what counts as a regression, and what is noise."""

import json
import random

import pytest

from benchmarks.compare import main

NAMES = {"cpu": {"name": "a CPU"}, "gpu": None}


def times(peer: str, samples: list[float], **more) -> dict:
    entry = {"group": "op", "shape": {"tokens": 8}, "dtype": "float32", "pass": "both", "method": "host"}
    return entry | {"peer": peer, "beside": ["eager", "torch"], "samples_us": samples} | more


def noisy(center: float, seed: int, spread=0.1) -> list[float]:
    draw = random.Random(seed)
    return [center * (1 + spread * draw.uniform(-1, 1)) for _ in range(25)]


@pytest.fixture
def run(tmp_path, capsys):
    def run(old: list[dict], new: list[dict], *options: str, machine=NAMES) -> tuple[int, str]:
        for name, entries, header in (("old", old, NAMES), ("new", new, machine)):
            (tmp_path / name).write_text(json.dumps(header | {"entries": entries}))
        code = main([str(tmp_path / "old"), str(tmp_path / "new"), *options])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_a_slower_own_peer_is_a_regression(run):
    code, out = run([times("torch", noisy(100, 0))], [times("torch", noisy(130, 1))])
    assert code == 1
    assert "REGRESSION" in out
    assert float(out.split()[0]) == pytest.approx(1.3, abs=0.05)


def test_noise_is_none(run):
    for seed in range(1, 6):
        assert run([times("torch", noisy(100, 0, 0.3))], [times("torch", noisy(102, seed, 0.3))])[0] == 0


def test_a_median_that_its_samples_do_not_pin_down_is_none(run):
    """8 % above, where the samples spread over half of their size."""
    assert run([times("torch", noisy(100, 0, 0.5))], [times("torch", noisy(108, 5, 0.5))])[0] == 0


def test_faster_or_another_peer_is_none(run):
    assert run([times("torch", noisy(100, 0))], [times("torch", noisy(50, 1))])[0] == 0
    assert run([times("eager", noisy(100, 0))], [times("eager", noisy(300, 1))])[0] == 0


def test_threshold(run):
    old, new = [times("fused-recompute", [100.0] * 9)], [times("fused-recompute", [104.0] * 9)]
    assert run(old, new)[0] == 1
    assert run(old, new, "--threshold", "0.05")[0] == 0


def test_relative_times_forget_a_slow_machine(run):
    old = [times("eager", noisy(100, 0)), times("torch", noisy(90, 0))]
    slow_machine = [times("eager", noisy(200, 1)), times("torch", noisy(180, 1))]
    assert run(old, slow_machine)[0] == 1
    assert run(old, slow_machine, "--relative")[0] == 0
    slower_peer = [times("eager", noisy(200, 1)), times("torch", noisy(260, 1))]
    assert run(old, slower_peer, "--relative")[0] == 1


@pytest.mark.parametrize("field", ["kept_bytes", "peak_bytes"])
def test_more_memory_is_a_regression(field, run):
    def entry(size):
        return {"group": "memory", "shape": {"tokens": 8}, "dtype": "float32", "peer": "fused", field: size}

    assert run([entry(100)], [entry(103)])[0] == 0
    assert run([entry(100)], [entry(104)])[0] == 1


def test_a_shorter_longest_row_is_a_regression(run):
    def entry(tokens, peer="hycam-fused"):
        shape = {"model": "a", "batch": 1}
        return {"group": "longest", "shape": shape, "setting": "plain", "peer": peer, "longest_tokens": tokens}

    assert run([entry(8192)], [entry(9216)])[0] == 0
    assert run([entry(8192)], [entry(7680)])[0] == 1
    assert run([entry(8192)], [entry(0)])[0] == 1
    assert run([entry(8192, "lora")], [entry(4096, "lora")])[0] == 0


@pytest.mark.parametrize(
    ("peer", "code"), [("hycam-fused", 1), ("hycam-torch", 1), ("hycam-eager", 0), ("lora", 0), ("frozen", 0)]
)
def test_steps_of_the_own_methods_are_gated(peer, code, run):
    def step(samples, setting):
        shape = {"model": "a", "batch": 8, "length": 1200}
        return times(peer, samples, group="step", shape=shape, setting=setting, **{"pass": "step"})

    old = [step(noisy(100, 0), "plain"), step(noisy(200, 0), "checkpointing")]
    assert run(old, [step(noisy(130, 1), "plain"), step(noisy(200, 1), "checkpointing")])[0] == code
    assert run(old, [step(noisy(100, 1), "plain"), step(noisy(200, 1), "checkpointing")])[0] == 0


def test_kernels_are_gated_by_name(run):
    def kernel(name, samples):
        entry = {"group": "kernel", "shape": {"tokens": 8}, "what": name, "peer": "fused", "method": "graph"}
        return entry | {"samples_us": samples, "floor_us": 1.0}

    old = [kernel("a_kernel", [100.0] * 9), kernel("b_kernel", [10.0] * 9)]
    code, out = run(old, [kernel("a_kernel", [100.0] * 9), kernel("b_kernel", [12.0] * 9)])
    assert code == 1
    assert [line for line in out.splitlines() if "REGRESSION" in line and "b_kernel" in line]
    assert not [line for line in out.splitlines() if "REGRESSION" in line and "a_kernel" in line]


@pytest.mark.parametrize("outcome", ["wrong", "error"])
def test_a_result_that_is_none_any_more_is_a_regression(outcome, run):
    other = times("eager", [1.0, 1.0])
    failed = {"group": "op", "shape": {"tokens": 8}, "dtype": "float32", "peer": "torch", outcome: "why"}
    code, out = run([other, times("torch", [1.0, 1.0])], [other, failed])
    assert code == 1
    assert "none any more" in out
    skipped = {"group": "op", "shape": {"tokens": 8}, "skipped": "0 s were left"}
    assert run([other, times("torch", [1.0, 1.0])], [other, skipped])[0] == 0


def test_different_shapes_are_not_compared(run):
    other = times("torch", noisy(300, 0), shape={"tokens": 9})
    same = times("torch", noisy(100, 0), **{"pass": "forward"})
    assert run([times("torch", noisy(100, 0)), same], [other, same])[0] == 0


def test_other_machines_or_nothing_in_common_can_not_be_compared(run):
    same = [times("torch", [1.0])]
    code, out = run(same, same, machine=NAMES | {"cpu": {"name": "another CPU"}})
    assert code == 2
    assert "another CPU" in out
    assert run(same, [times("fused", [1.0])])[0] == 2
