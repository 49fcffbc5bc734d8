"""A small run as the planner and the worker both see it."""

import torch

from hycam.training.recipe import Recipe, parse_recipe
from tests.models import tiny_config

BUCKET = 16384
# the vocabulary is as large beside the width as in real models, where the loss sets the peak
SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 4096}


def config(family: str = "llama"):
    return tiny_config(family, **SIZES)


def recipe(dtype: str = "float32", method: dict | None = None, **trainer) -> Recipe:
    values = {
        "backbone": {"name_or_path": "unused", "dtype": dtype},
        "method": method or {"r": 16, "num_experts": 4},
        "data": {"max_length": 64},
        "trainer": {"per_device_train_batch_size": 4, "report_to": "none"} | trainer,
    }
    return parse_recipe(values, "test")


def deepspeed(stage: int, dtype: str) -> dict:
    """DeepSpeed's settings under which everything that a stage partitions really is."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": 0,
        },
    }


def batch(rows: int = 4, length: int = 64) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0  # real batches have padding, which makes the model build a mask
    return {"input_ids": ids, "labels": ids, "attention_mask": mask}
