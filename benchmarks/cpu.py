"""The package on a CPU, peers in turn: ``python -m benchmarks.cpu --out FILE``.

The op beside plain autograd, torch.compile and the released code's formulation; small calls and generation without
gradients; attention layers, training steps and generation on tiny backbones; the longest row of a 7B shape by count;
by profile what the op's time consists of; and steps with the logits of all tokens, and as `hycam train` takes them.

Ratios within one record are meaningful as far as their spread says; times of a shared machine are not. Where other
processes are busy, ``--cpu-time`` counts this process's own processor time, on one thread.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.harness.record import Budget, Record, environment
from benchmarks.harness.session import Session
from benchmarks.harness.timing import HostTimer
from benchmarks.models.backbones import ModelShape
from benchmarks.models.longest import measure_longest
from benchmarks.models.measure import measure_attention, measure_generation, measure_steps, measure_token_profile
from benchmarks.models.shapes import (
    CPU_DECODING,
    CPU_GENERATION,
    CPU_MODELS,
    CPU_RESPONSES,
    CPU_STEPS,
    LONGEST,
    NEW_TOKENS,
)
from benchmarks.models.training import PLAIN, Setting
from benchmarks.op.floor import PRODUCTS, measure_products, measure_profile
from benchmarks.op.measure import measure_op, measure_overhead, measure_rates
from benchmarks.op.shapes import CPU, CPU_INFERENCE, CPU_LENGTHS, CPU_PRODUCTS, CPU_SWEEP, LAUNCH, Shape

PAPER_PEERS = ("eager", "torch", "torch-recompute", "compile", "compile-max-autotune")
RELEASED_PEERS = ("released", "torch-released")
DTYPES = (torch.float32, torch.bfloat16)


LAYER_METHODS = ("frozen", "hycam-eager", "hycam-torch")
WHOLE_METHODS = (*LAYER_METHODS, "lora")
STEP_METHODS = ("frozen", "hycam-eager", "hycam-torch", "lora", "multilora", "moe-lora", "full")


def measure(
    session: Session,
    shapes: Sequence[Shape] = CPU,
    copy_bytes: int = 1 << 26,
    paper_peers: Sequence[str] = PAPER_PEERS,
) -> None:
    """Rates and floors, the op's passes, and memory. A compiler needs half a minute for each."""
    for dtype in DTYPES:
        measure_rates(session, dtype, shapes, copy_bytes)
        for shape in shapes:
            measure_op(session, shape, dtype, paper_peers)
            measure_op(session, shape, dtype, RELEASED_PEERS)


def measure_calls(session: Session) -> None:
    """The host's time of a call whose arithmetic hardly counts."""
    measure_overhead(session, LAUNCH, torch.float32, ("eager", "torch"))


def measure_inference(
    session: Session, calls: Sequence[Shape] = CPU_INFERENCE, decoding: Sequence[ModelShape] = CPU_DECODING
) -> None:
    """Without gradients: small calls of the op, and `generate` on a backbone whose tokens are bound by its weights."""
    for dtype in DTYPES:
        for call in calls:
            measure_op(session, call, dtype, ("eager", "torch"), passes=("inference",), group="decode")
        for shape in decoding:
            measure_generation(session, shape, dtype, WHOLE_METHODS, NEW_TOKENS["cpu"], seconds=40)


def measure_floors(
    session: Session,
    shapes: Sequence[Shape] = CPU_PRODUCTS,
    lengths: Sequence[Shape] = CPU_LENGTHS,
    threads: Sequence[int] = (1, 2),
) -> None:
    """The op and its peers as multiples of the products alone, on one thread and on two; and a token by the length."""
    _age_allocator()
    for shape in lengths:
        measure_products(session, shape, torch.float32, 1, (PRODUCTS, "torch"), seconds=30)
    for count in threads:
        for shape in shapes:
            for dtype in DTYPES:
                measure_products(session, shape, dtype, count)


def measure_profiles(
    session: Session, shapes: Sequence[Shape] = CPU_PRODUCTS, decoding: Sequence[ModelShape] = CPU_DECODING
) -> None:
    """What the op's time, and a token's, consists of beside the products alone and the bare model, on one thread."""
    _age_allocator()
    for dtype in DTYPES:
        for shape in shapes:
            measure_profile(session, shape, dtype)
    for model in decoding:
        measure_token_profile(session, model, torch.bfloat16, ("frozen", "hycam-torch"))


def _age_allocator() -> None:
    """Free what a training process has freed long since: before that each call's memory goes back to the system."""
    torch.empty(31 << 20, dtype=torch.uint8).fill_(0)


def measure_sweep(session: Session, shapes: Sequence[Shape] = CPU_SWEEP, copy_bytes: int = 1 << 26) -> None:
    """The share of the floor against T and d, in float32."""
    measure_rates(session, torch.float32, shapes, copy_bytes)
    for shape in shapes:
        measure_op(session, shape, torch.float32, ("eager", "torch"), group="sweep")


def measure_models(
    session: Session,
    shapes: Sequence[ModelShape] = CPU_MODELS,
    generation: Sequence[ModelShape] = CPU_GENERATION,
    longest: ModelShape = LONGEST,
    longest_methods: Sequence[str] = STEP_METHODS,
    trained: Sequence[ModelShape] = CPU_STEPS,
) -> None:
    """Attention layers, training steps, generation, and the longest row of a 7B shape by count."""
    for shape in trained:
        measure_steps(session, shape, torch.bfloat16, WHOLE_METHODS)
    for shape in shapes:
        measure_attention(session, shape, torch.float32, LAYER_METHODS)
        for setting in (PLAIN, Setting(checkpointing=True)):
            measure_steps(session, shape, torch.float32, STEP_METHODS, setting, seconds=10)
    for shape in generation:
        measure_generation(session, shape, torch.float32, LAYER_METHODS, NEW_TOKENS["cpu"])
    measure_longest(session, longest, torch.bfloat16, longest_methods, (PLAIN, Setting(checkpointing=True)))


def measure_targets(
    session: Session, shape: ModelShape = CPU_RESPONSES, methods: Sequence[str] = ("lora", "hycam-torch")
) -> None:
    """Training steps with the logits of every token, with those that the loss reads, and on rows alike in length."""
    # a trainer needs packages that the other parts don't
    from benchmarks.models.responses import measure_responses

    for name in methods:
        measure_responses(session, shape, torch.bfloat16, name)


PARTS: dict[str, Callable[[Session], None]] = {
    "op": measure,
    "calls": measure_calls,
    "inference": measure_inference,
    "models": measure_models,
    "floors": measure_floors,
    "sweep": measure_sweep,
    "profile": measure_profiles,
    "targets": measure_targets,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the record's file")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each time (default: 15)")
    parser.add_argument("--seconds", type=float, default=1500, help="for everything (default: 1500)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="by default all")
    parser.add_argument("--cpu-time", action="store_true", help="processor time on one thread, for a busy machine")
    options = parser.parse_args(arguments)
    if options.cpu_time:
        torch.set_num_threads(1)
    record = Record(options.out, environment())
    record.write()
    timers = [HostTimer(cpu_time=options.cpu_time)]
    session = Session(record, Budget(options.seconds), torch.device("cpu"), timers, options.rounds)
    for part in (PARTS[name] for name in options.parts):
        part(session)
    return 0


if __name__ == "__main__":
    sys.exit(main())
