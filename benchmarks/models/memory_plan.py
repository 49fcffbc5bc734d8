"""The memory that known shapes need, planned for every engine on 1, 8 and 64 GPUs, and the tables of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from benchmarks.harness.pages import markdown
from benchmarks.harness.record import Entry, Record
from hycam.planning.engines import ENGINES, engine_of
from hycam.planning.plan import plan_memory
from hycam.training.recipe import parse_recipe

WORLD_SIZES = (1, 8, 64)
_POSITIONS = 32768

SHAPES: Mapping[str, PretrainedConfig] = {
    "Llama 3.2 1B": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=_POSITIONS, tie_word_embeddings=True,
    ),
    "Llama 3.1 8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=_POSITIONS,
    ),
    "Qwen 2.5 14B": Qwen2Config(
        vocab_size=152064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40,
        num_key_value_heads=8, max_position_embeddings=_POSITIONS,
    ),
}  # fmt: skip
# bfloat16 products in all of them but the last
PRECISIONS: Mapping[str, Mapping[str, Any]] = {
    "bf16, adapter in fp32": {"dtype": "bfloat16"},
    "pure bf16": {"dtype": "bfloat16", "autocast_adapter_dtype": False},
    "bf16 autocast over fp32": {"dtype": "float32", "bf16": True},
    "fp32": {"dtype": "float32"},
}
CHECKPOINTING: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "non-reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
}


def plan(
    shape: str,
    engine: str,
    world_sizes: Sequence[int],
    *,
    dtype: str = "bfloat16",
    autocast_adapter_dtype: bool = True,
    bf16: bool = False,
    checkpointing: str = "non-reentrant",
) -> list[Entry]:
    """Entries of the record: the paper's adapter, micro-batches of 4 rows of 1,200 tokens."""
    trainer: dict[str, Any] = {"per_device_train_batch_size": 4, "bf16": bf16}
    if engine.startswith("zero"):
        zero = {"stage": int(engine[-1]), "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
        trainer |= {"deepspeed": {"zero_optimization": zero, "bf16": {"enabled": True}}}
    if checkpointing != "none":
        trainer |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": dict(CHECKPOINTING[checkpointing])}
    values = {
        "backbone": {"name_or_path": shape, "dtype": dtype},
        "method": {"preset": "paper", "autocast_adapter_dtype": autocast_adapter_dtype},
        "data": {"max_length": 1200},
        "trainer": trainer,
    }
    recipe = parse_recipe(values, "benchmarks.plan")
    plans = plan_memory(recipe, SHAPES[shape], engine_of(recipe, engine), list(world_sizes))
    return [{"shape": shape, "checkpointing": checkpointing, **found.to_dict()} for found in plans]


def measure(record: Record) -> None:
    for shape in SHAPES:
        for engine in ENGINES:
            for entry in plan(shape, engine, WORLD_SIZES):
                record.add({"group": "engines", **entry})
    for name, options in PRECISIONS.items():
        for entry in plan("Llama 3.1 8B", "ddp", [8], **options):
            record.add({"group": "precision", "precision": name, **entry})
    for name in CHECKPOINTING:
        for entry in plan("Llama 3.1 8B", "ddp", [8], checkpointing=name):
            record.add({"group": "checkpointing", **entry})


def gib(value: int) -> str:
    return f"{value / 2**30:.2f}"


def engines(record: Entry) -> str:
    """GiB per GPU, in all, by shape, engine and number of GPUs."""
    found = {(e["shape"], e["engine"], e["world_size"]): e for e in record["entries"] if e["group"] == "engines"}
    rows = [
        [shape, engine, *(gib(found[shape, engine, size]["sum"]) for size in WORLD_SIZES)]
        for shape in SHAPES
        for engine in ENGINES
    ]
    return markdown(["shape", "engine", *(f"{n} GPU{'s' if n > 1 else ''}" for n in WORLD_SIZES)], rows)


_PARTS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "gathered": "gathered",
    "buckets": "buckets",
    "sum": "sum",
}


def _parts(entries: Sequence[Entry], *names: str) -> str:
    rows = [[*(str(entry[name]) for name in names), *(gib(entry[part]) for part in _PARTS)] for entry in entries]
    return markdown([*names, *_PARTS.values()], rows)


def parts(record: Entry) -> str:
    """What the sums on 8 GPUs are made of."""
    entries = [e for e in record["entries"] if e["group"] == "engines" and e["world_size"] == 8]
    return _parts(entries, "shape", "engine")


def precision(record: Entry) -> str:
    return _parts([e for e in record["entries"] if e["group"] == "precision"], "precision")


def checkpointing(record: Entry) -> str:
    return _parts([e for e in record["entries"] if e["group"] == "checkpointing"], "checkpointing")


TABLES = {
    "memory-engines": engines,
    "memory-parts": parts,
    "memory-precision": precision,
    "memory-checkpointing": checkpointing,
}
