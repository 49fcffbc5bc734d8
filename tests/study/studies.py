"""A tiny study for the tests: two tasks, a random backbone, methods of a few parameters."""

from pathlib import Path
from typing import Any

import yaml

from tests.training.runs import recipe_values, save_rows
from tests.training.runs import rows as task_rows


def study_values(folder: Path, backbone: Path, /, **sections: Any) -> dict[str, Any]:
    """A study of two methods, one of them with a grid of two rates, over two seeds: four steps a run."""
    run = recipe_values(folder, backbone)
    trainer = {key: value for key, value in run["trainer"].items() if key != "learning_rate"}
    values: dict[str, Any] = {
        "output_dir": str(folder / "study"),
        "seeds": [0, 1],
        "learning_rates": [1e-2],
        "backbones": {"tiny": run["backbone"]},
        "methods": {
            "lora": {"name": "lora", "r": 2, "learning_rates": [1e-3, 1e-2]},
            "hycam": {"r": 2, "num_experts": 2},
        },
        "tasks": run["tasks"],
        "data": run["data"],
        "trainer": trainer | {"max_steps": 4, "eval_steps": 2, "save_steps": 2},
    }
    for name, section in sections.items():
        values[name] = values[name] | section if name in ("trainer", "data") else section
    return values


def save_study(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def scratch_backbone(folder: Path, **fields: Any) -> dict[str, Any]:
    """The section of a backbone that a study trains in a second, on a text file that this writes."""
    text = save_rows(
        folder / "text.jsonl", [{"text": f"{row['instruction']}: {row['output']}"} for row in task_rows(60)]
    )
    return {
        "scratch": {
            "corpus": str(text),
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "steps": 3,
            "batch_size": 2,
            "sequence_length": 16,
            **fields,
        }
    }
