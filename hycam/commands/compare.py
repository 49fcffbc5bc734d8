"""`hycam compare`."""

import os
from argparse import Namespace

import torch
from rich.markup import escape
from rich.table import Table

from hycam.commands.tables import show
from hycam.errors import InputError, RunStoppedError
from hycam.study.recipe import load_study
from hycam.study.record import STUDY_RECORD
from hycam.study.render import Table as StudyTable
from hycam.study.render import shown, write_tables
from hycam.study.run import compare
from hycam.study.tables import study_tables
from hycam.training.engines import check_gpus


def run(options: Namespace) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "hycam compare: started by a launcher of several processes, wanted one process per GPU, each "
            "started by itself with its own CUDA_VISIBLE_DEVICES: they share the study's folder"
        )
    study = load_study(options.study, options.overrides)
    if not study.trainer.get("use_cpu"):
        check_gpus(torch.cuda.device_count(), f"CUDA_VISIBLE_DEVICES=N hycam compare {options.study}")
    record = compare(study, _announce, _announce)
    tables = study_tables(record)
    folder = write_tables(study.output_path, tables)
    show(*map(study_table, tables))
    print(f"record: {study.output_path / STUDY_RECORD}, tables: {folder}")
    failed = [cell for cell in record["cells"] if cell["status"] == "failed"]
    if failed:
        names = ", ".join(
            f"{cell['backbone']}/{cell['method']}/fold{cell['fold']}-seed{cell['seed']}" for cell in failed
        )
        raise RunStoppedError(f"{len(failed)} of {record['planned']} cells failed, the next call tries again: {names}")


def _announce(line: str) -> None:
    print(line, flush=True)


def study_table(table: StudyTable) -> Table:
    """A study's table for the terminal."""
    drawn = Table(title=table.title)
    for index, column in enumerate(table.columns):
        drawn.add_column(column, justify="right" if index else "left")
    for section, rows in table.sections():
        if section:
            drawn.add_row(f"[i]{escape(section)}[/i]")
        for row in rows:
            drawn.add_row(*(escape(shown(cell)) for cell in row.cells))
        drawn.add_section()
    return drawn
