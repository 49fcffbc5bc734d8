"""Configurations as data: one JSON table per GPU family, chosen by (tokens, d, E, r) and dtype.

A table maps a kernel's name to rows, tried in order; the first whose limits all hold is used. Limits are ``dtypes`` (a
list), ``max_tokens``, ``max_dim``, ``max_experts``, ``max_rank``, ``min_rank``, ``kept`` (whether S is kept for the
backward) and ``plain`` (whether there is neither a residual stream nor a bias of the experts, which take registers); an
absent one always holds. ``before_triton`` and ``from_triton`` say whose compiler a row is for, since each spills
registers of other tiles: a table is read without the rows for others. The rest of a row is what the kernel is launched
with: its block sizes, ``num_warps``, ``num_stages``, and the like. The kernels in `OPTIONAL` may have no row for a
call: others do their work there. Every other kernel's last row is without limits. A row with ``"candidate": true``
takes no call: nothing says yet that it pays, but it is built, tested and measured like the others.
A table of one's own (`hycam_kernels.tune`) in the folder that the variable HYCAM_KERNELS_TABLES names goes before the
shipped one of its family.
"""

import json
import os
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from hycam_kernels.versions import release

Config = dict[str, Any]
Table = dict[str, list[Config]]

# the table for TRITON_INTERPRET=1, whose cost goes with the number of programs
INTERPRETER = "interpreter"
# kernels that a table may leave out
OPTIONAL = ("row_grad", "product_forward")
# what the kernels' launchers take from every row
_OF_ROWS = {"v_grad": "EXPERTS", "b_grad": "EXPERTS"}
_FOLDER = resources.files("hycam_kernels.backends.triton") / "configs"
_LIMITS = ("max_tokens", "max_dim", "max_experts", "max_rank")
_NOT_LAUNCHED = ("candidate", "dtypes", "kept", "min_rank", "plain", *_LIMITS)


def families() -> list[str]:
    """GPU families that have a table."""
    names = [file.name.removesuffix(".json") for file in _FOLDER.iterdir() if file.name.endswith(".json")]
    return sorted(set(names) - {INTERPRETER})


def family_of(device: torch.device) -> str | None:
    """The table for a CUDA or ROCm device: its own family's, else the newest older one of its major version."""
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return name if name in families() else None
    return family_of_capability(*torch.cuda.get_device_capability(device))


def family_of_capability(major: int, minor: int) -> str | None:
    known = sorted(int(name.removeprefix("sm_")) for name in families() if name.startswith("sm_"))
    below = [arch for arch in known if arch // 10 == major and arch <= major * 10 + minor]
    return f"sm_{below[-1]}" if below else None


@cache
def load_table(family: str) -> Table:
    """The user's own table of a family, else the shipped one.

    Raises:
        ValueError: HYCAM_KERNELS_TABLES is no folder, or the table there lacks what the kernels need.
    """
    folder = os.environ.get("HYCAM_KERNELS_TABLES")
    shipped = _of_compiler(json.loads((_FOLDER / f"{family}.json").read_text()), _triton_version())
    if folder is None:
        return shipped
    if not Path(folder).is_dir():
        raise ValueError(f"HYCAM_KERNELS_TABLES must name a folder of tables, got {folder!r}")
    own = Path(folder, f"{family}.json")
    if not own.exists():
        return shipped
    table = _of_compiler(json.loads(own.read_text()), _triton_version())
    missing = [kernel for kernel in shipped if kernel not in (*table, *OPTIONAL)]
    missing += [
        f"{name} in a row of {kernel}"
        for kernel, name in _OF_ROWS.items()
        if not all(name in row for row in table.get(kernel, []))
    ]
    if missing:
        raise ValueError(f"{own} has no {', no '.join(missing)}: tune again, it's an earlier version's")
    return table


def _triton_version() -> str:
    import triton

    return triton.__version__


def _of_compiler(table: Table, version: str) -> Table:
    """The rows for this triton, without the limits that say so."""

    def takes(row: Config) -> bool:
        before, since = row.get("before_triton"), row.get("from_triton")
        return (before is None or release(version) < release(before)) and (
            since is None or release(version) >= release(since)
        )

    return {
        kernel: drop_limits([row for row in rows if takes(row)], "before_triton", "from_triton")
        for kernel, rows in table.items()
    }


def select(
    table: Table,
    kernel: str,
    dtype: torch.dtype,
    tokens: int,
    d: int,
    num_experts: int,
    rank: int,
    *,
    kept: bool = True,
    plain: bool = True,
) -> int | None:
    """Index of the first of the kernel's rows that takes the call, None where none does."""
    values = dict(zip(_LIMITS, (tokens, d, num_experts, rank), strict=True))
    name = str(dtype).removeprefix("torch.")
    for index, row in enumerate(table.get(kernel, [])):
        if (
            not is_candidate(row)
            and name in row.get("dtypes", [name])
            and all(values[key] <= row.get(key, values[key]) for key in _LIMITS)
            and rank >= row.get("min_rank", rank)
            and kept == row.get("kept", kept)
            and plain == row.get("plain", plain)
        ):
            return index
    return None


def launch_parameters(row: Config) -> Config:
    """A row without its limits."""
    return {key: value for key, value in row.items() if key not in _NOT_LAUNCHED}


def drop_limits(rows: list[Config], *limits: str) -> list[Config]:
    """The rows without some of their limits."""
    return [{key: value for key, value in row.items() if key not in limits} for row in rows]


def is_candidate(row: Config) -> bool:
    return row.get("candidate", False)


def with_candidates(table: Table) -> Table:
    """The table in which the candidates take their calls too."""
    return {kernel: drop_limits(rows, "candidate") for kernel, rows in table.items()}
