"""Adapt a real pretrained model without a GPU: the recipe `laptop`, on real sets where they are at hand.

They are, where the variable HYCAM_DATA names a folder with their files (`dolly.jsonl`, `code_alpaca.json`, ...), or
where the hub answers. Else it takes the synthetic tasks of the recipe. Further arguments go to `hycam train`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from huggingface_hub import HfApi

from hycam.data.formats import KNOWN_SETS

SETS = ("auto_cot", "dolly", "code_alpaca", "icliniq")
ROWS = 160


def real_tasks() -> list[dict[str, object]]:
    """The recipe's `tasks` of the real sets; empty where they are not at hand."""
    folder = os.environ.get("HYCAM_DATA")
    if folder is not None:
        files = {name: path for name in SETS for path in sorted(Path(folder).glob(f"{name}.json*"))}
        if not files:
            sys.exit(f"HYCAM_DATA: {folder} has none of the files {', '.join(f'{name}.json[l]' for name in SETS)}")
        return [{"name": name, "source": str(path), "max_rows": ROWS} for name, path in files.items()]
    try:
        for name in SETS:
            HfApi().dataset_info(KNOWN_SETS[name].hub_id, timeout=5)
    except Exception:  # offline by a variable, no route, no answer: all one here
        return []
    return [{"name": name, "max_rows": ROWS} for name in SETS]


if __name__ == "__main__":
    tasks = real_tasks()
    print(
        "tasks:", ", ".join(str(task["name"]) for task in tasks) if tasks else "synthetic, for no real set is at hand"
    )
    given = ["--tasks", json.dumps(tasks)] if tasks else []
    hycam = str(Path(sys.executable).with_name("hycam"))
    sys.exit(subprocess.call([hycam, "train", "laptop", "--overwrite", *given, *sys.argv[1:]]))
