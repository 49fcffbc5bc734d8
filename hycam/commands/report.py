"""`hycam report`."""

from argparse import Namespace
from pathlib import Path

from hycam.errors import InputError
from hycam.reporting.report import write_report


def run(options: Namespace) -> None:
    study = Path(options.study).expanduser()
    output = study / "report" if options.output is None else Path(options.output).expanduser()
    if output.exists() and not output.is_dir():
        raise InputError(f"--output: {output} is a file, wanted a folder")
    texts = None if options.text is None else Path(options.text).expanduser()
    report = write_report(study, output, texts=texts, hide_text=options.hide_text)
    for line in report.missing:
        print(f"left out: {line}")
    print(f"{len(report.files)} files of figures and tables: {output}")
