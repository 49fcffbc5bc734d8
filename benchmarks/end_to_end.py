"""Whole models by method: ``python -m benchmarks.end_to_end --out FILE [--parts ...] [--models ...] [--liger]``.

Training steps (time, bytes kept and at most), attention layers, generation, and the longest row of a 7B shape.
Backbones have known models' shapes and random weights, nothing is downloaded. `benchmarks.gpu` runs this with the
seconds that it has left; here it has all of its own. Without a GPU the backbones are tiny.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cpu import measure_models
from benchmarks.harness.record import Budget, Record, environment, gpu_state
from benchmarks.harness.session import Session
from benchmarks.harness.timing import EventTimer, GraphTimer, HostTimer
from benchmarks.models.backbones import ModelShape
from benchmarks.models.longest import measure_longest
from benchmarks.models.measure import measure_attention, measure_generation, measure_steps
from benchmarks.models.methods import METHODS
from benchmarks.models.shapes import GENERATION, LAYERS, LONGEST, MODELS, NEW_TOKENS
from benchmarks.models.training import PLAIN, Setting

DTYPE = torch.bfloat16
CHECKPOINTING = Setting(checkpointing=True)
# those that a goal compares come first
STEP_METHODS = (
    "frozen",
    "hycam-fused",
    "lora",
    *(name for name in METHODS if name not in ("frozen", "hycam-fused", "lora")),
)
LAYER_METHODS = ("frozen", "hycam-fused", "hycam-eager")


PARTS = ("steps", "generation", "attention", "longest")


def measure_on_gpu(
    record: Record,
    budget: Budget,
    models: Sequence[ModelShape] = MODELS,
    parts: Sequence[str] = PARTS,
    *,
    liger: bool = False,
    generation: Sequence[ModelShape] = GENERATION,
    new_tokens: int = NEW_TOKENS["cuda"],
    layers: Sequence[ModelShape] = LAYERS,
    longest: ModelShape = LONGEST,
    rounds: int = 8,
) -> None:
    """The most telling first: what is large may leave no time for the rest."""
    device = torch.device("cuda", torch.cuda.current_device())
    session = Session(record, budget, device, [GraphTimer(), EventTimer(warmup=1)], rounds)
    settings = [
        Setting(checkpointing, on) for on in ([False, True] if liger else [False]) for checkpointing in (False, True)
    ]
    for part in parts:
        if part == "steps":
            for shape in models:
                for setting in settings:
                    measure_steps(session, shape, DTYPE, STEP_METHODS, setting)
        elif part == "generation":
            for shape in generation:
                measure_generation(session, shape, DTYPE, LAYER_METHODS, new_tokens)
        elif part == "attention":
            for shape in layers:
                measure_attention(session, shape, DTYPE, LAYER_METHODS)
        else:
            measure_longest(session, longest, DTYPE, STEP_METHODS, (PLAIN, CHECKPOINTING))
    record.content["gpu_after"] = gpu_state()
    record.write()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.split("\n\n")[1])
    parser.add_argument("--out", type=Path, required=True, help="the record's file")
    parser.add_argument("--seconds", type=float, default=540, help="for everything (default: 540)")
    parser.add_argument("--commit", help="of the sources, where there is no repository; a + at its end: changed since")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="on CUDA, in this order")
    known = [shape.model for shape in MODELS]
    parser.add_argument("--models", nargs="+", choices=known, default=known, help="on CUDA, in this order")
    parser.add_argument("--liger", action="store_true", help="also with liger-kernel's norms, MLPs and loss")
    options = parser.parse_args(arguments)
    record = Record(options.out, environment(options.commit))
    record.write()
    budget = Budget(options.seconds)
    if torch.cuda.is_available():
        by_name = {shape.model: shape for shape in MODELS}
        measure_on_gpu(record, budget, [by_name[name] for name in options.models], options.parts, liger=options.liger)
    else:
        measure_models(Session(record, budget, torch.device("cpu"), [HostTimer()], rounds=8))
    return 0 if any(entry["group"] == "step" and "samples_us" in entry for entry in record.entries) else 1


if __name__ == "__main__":
    sys.exit(main())
