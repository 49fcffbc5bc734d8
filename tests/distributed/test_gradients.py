"""Under every engine, two processes have the gradients of one that runs the same micro-batches with the same noise."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hycam.data.collation import Collator
from tests.adapter.builders import by_saved_name, gradients
from tests.distributed.jobs import setting_name, step_model, step_rows
from tests.distributed.ranks import WORLD_SIZE, log_of, run_jobs

pytest.importorskip("deepspeed")

ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
CHECKPOINTING = ["none", "non-reentrant", "reentrant"]
PRODUCT = list(itertools.product(ENGINES, CHECKPOINTING, [1, 4], ["float32"], ["model", "outside"])) + [
    (engine, "non-reentrant", 4, "bfloat16", "model") for engine in ENGINES
]
# every engine, both kinds of checkpointing, both accumulations, and bf16 with fp32 adapter weights and without; the
# model's own loss and one that the trainer makes
COVERING = [
    ("ddp", "reentrant", 4, "float32", "model"),
    ("ddp", "none", 4, "bfloat16", "model"),
    ("ddp", "none", 4, "float32", "outside"),
    ("zero1", "none", 4, "float32", "model"),
    ("zero2", "non-reentrant", 1, "float32", "model"),
    ("zero2", "none", 4, "float32", "outside"),
    ("zero3", "reentrant", 4, "float32", "outside"),
    ("zero3", "none", 4, "bfloat16", "model"),
    ("fsdp2", "non-reentrant", 4, "float32", "outside"),
    ("fsdp2", "reentrant", 1, "float32", "model"),
]


def _done(folder: Path, settings: list[tuple[str, str, int, str, str]]) -> Path:
    names = ("engine", "checkpointing", "accumulation", "dtype", "loss")
    jobs = [{"job": "gradient"} | dict(zip(names, setting, strict=True)) for setting in settings]
    statuses = run_jobs(folder, jobs, timeout=900)
    assert statuses == [0, 0], "\n".join(log_of(folder, rank)[-3000:] for rank in range(WORLD_SIZE))
    return folder


@pytest.fixture(scope="module")
def covering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _done(tmp_path_factory.mktemp("covering"), COVERING)


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _done(tmp_path_factory.mktemp("product"), PRODUCT)


@pytest.mark.parametrize("setting", COVERING, ids=lambda setting: setting_name(*setting))
def test_covering_selection(covering: Path, setting: tuple[str, str, int, str, str]) -> None:
    _check(covering / setting_name(*setting), *setting)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("setting", PRODUCT, ids=lambda setting: setting_name(*setting))
def test_whole_product(product: Path, setting: tuple[str, str, int, str, str]) -> None:
    _check(product / setting_name(*setting), *setting)


def _check(folder: Path, engine: str, checkpointing: str, accumulation: int, dtype: str, loss: str) -> None:
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]
    _check_batches(ranks, accumulation)
    got = load_file(folder / "adapter_model.safetensors")
    is_pure = dtype == "bfloat16" and engine.startswith("zero")  # DeepSpeed casts every weight, but no buffer
    want = _one_process(ranks, dtype, is_pure=is_pure)
    assert got.keys() == want.keys()
    if dtype == "float32":
        bounds = {name: 1e-5 * want[name].abs().max() for name in want}
    else:
        want, bounds = _bfloat16_bounds(ranks, want, is_pure=is_pure)
    errors = {name: (got[name].double() - want[name].double()).abs().max() for name in want}
    ratio, name = max((float(errors[name] / bounds[name]), name) for name in want)
    print(f"{folder.name}: largest error is {ratio:.3f} of its bound ({name}: {errors[name]:.2e})")
    assert ratio <= 1
    # the bound tells one rank's noise from the other's
    other = _one_process(ranks, dtype, is_pure=is_pure, same_noise=True)
    assert any((got[name].double() - other[name].double()).abs().max() > 3 * bounds[name] for name in want)


def _check_batches(ranks: list[list[dict]], accumulation: int) -> None:
    """All rows came, the last micro-batch was filled up, and padding differed between the ranks."""
    seen: list[tuple[int, ...]] = []
    for kept in ranks:
        assert len(kept) == accumulation
        for batch in kept:
            mask = batch["inputs"]["attention_mask"].bool()
            seen += [tuple(row[m].tolist()) for row, m in zip(batch["inputs"]["input_ids"], mask, strict=True)]
    rows = [tuple(row) for row in step_rows(accumulation)["input_ids"]]
    assert set(seen) == set(rows)
    assert len(seen) == len(rows) + 1
    shares = [[batch["inputs"]["attention_mask"].float().mean().item() for batch in kept] for kept in ranks]
    assert shares[0] != shares[1]


def _one_process(
    ranks: list[list[dict]], dtype: str, *, is_pure: bool = False, is_exact: bool = False, same_noise: bool = False
) -> dict[str, torch.Tensor]:
    """The gradients by the adapter file's names: the micro-batches of all ranks one after another.

    `is_pure` casts the adapter's weights to `dtype` too; `is_exact` then computes in float64.
    """
    model = step_model(dtype)
    if is_pure:
        for parameter in model.parameters():
            parameter.data = parameter.to(getattr(torch, dtype))
    if is_exact:
        model.double()
    total = sum(_targets(batch["inputs"]) for kept in ranks for batch in kept)
    calls = model.get_base_model().hycam_binding.calls
    for rank, kept in enumerate(ranks):
        calls.data_parallel_rank = lambda rank=rank: 0 if same_noise else rank
        for batch in kept:
            torch.set_rng_state(batch["random_state"])
            model(**batch["inputs"], num_items_in_batch=total).loss.backward()
    return by_saved_name(gradients(model).items())


def _targets(inputs: dict[str, torch.Tensor]) -> int:
    return int((inputs["labels"][:, 1:] != -100).sum())


def _bfloat16_bounds(
    ranks: list[list[dict]], one_process: dict[str, torch.Tensor], *, is_pure: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The float64 gradients, and how far from them an engine in bfloat16 may be.

    As far as one process in bfloat16 is, twice over: the engine sums in another order. An engine whose gradients
    themselves are bfloat16 also rounds every partial sum over micro-batches and ranks, by at most half a unit in the
    last place (2^-9) of a value that is at most the sum of the parts' sizes.
    """
    exact = _one_process(ranks, "bfloat16", is_pure=is_pure, is_exact=True)
    sums = sum(len(kept) for kept in ranks) if is_pure else 0
    bounds = {}
    for name, gradient in exact.items():
        own = (one_process[name].double() - gradient).abs().max()
        bounds[name] = 2 * own + sums * 2.0**-9 * gradient.abs().max()
    return exact, bounds


def test_the_reference_sees_every_parameter() -> None:
    """The replay that the engines are compared with has a gradient for router, experts and shared weight."""
    batch = Collator(0)([step_rows(1)[row] for row in range(3)])
    kept = {"random_state": torch.get_rng_state(), "inputs": batch}
    names = {name.split(".self_attn.")[1] for name in _one_process([[kept]], "float32")}
    stacked = {f"hycam_lora_{factor}" for factor in "anb"}
    assert names == {"hycam_shared.weight", "hycam_router.weight"} | stacked
