"""`hycam generate`."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from hycam.commands.selection import check_output, select
from hycam.data.files import READERS, kind_of
from hycam.data.tokenization import encode_prompt, encode_row_prompt
from hycam.errors import InputError
from hycam.evaluation.generation import encode_prompts, generate_responses
from hycam.training.backbone import load_backbone_config
from hycam.training.measure import training_precision
from hycam.training.trained import load_selected_model, load_selected_tokenizer


def run(options: Namespace) -> None:
    selection = select(options)
    recipe = selection.recipe
    if options.file is None:
        rows = {"--prompt": {"instruction": options.prompt, "input": ""}}
    else:
        rows = read_rows(Path(options.file), [task.fields for task in recipe.tasks if task.fields is not None])
    output = None if options.output is None else Path(options.output)
    if output is not None:
        check_output(output)
    name, tokenizer = load_selected_tokenizer(selection)
    config = load_backbone_config(recipe.backbone, name)
    max_new_tokens = options.max_new_tokens or recipe.evaluation.max_new_tokens
    chosen = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k")}
    sampling = {name: value for name, value in chosen.items() if value is not None}
    prompts: dict[str, list[int]] = {}
    for place, row in rows.items():
        if options.raw:
            ids = encode_prompt(row["instruction"] + row["input"], tokenizer)
        else:
            ids = encode_row_prompt(row, recipe.data.prompt, tokenizer)
        try:
            (prompts[place],) = encode_prompts([ids], tokenizer, config, max_new_tokens)
        except InputError as error:
            if options.file is None:
                raise
            reason = str(error).removeprefix("prompts: prompt 0")
            print(f"hycam: left out: {place}: the prompt{reason}", file=sys.stderr)
    if not prompts:
        raise InputError(f"--file: {options.file}: no prompt can be answered")
    model = load_selected_model(selection, name, tokenizer)
    set_seed(recipe.seed)
    streams = options.file is None and output is None and sys.stdout.isatty()
    with training_precision(recipe, model.device):
        responses = generate_responses(
            model,
            tokenizer,
            list(prompts.values()),
            max_new_tokens=max_new_tokens,
            batch_size=recipe.evaluation.batch_size,
            sampling=sampling or None,
            on_text=partial(print, end="", flush=True) if streams else None,
        )
    answered = [rows[place] | {"response": response} for place, response in zip(prompts, responses, strict=True)]
    if output is not None:
        output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answered), encoding="utf-8")
        print(f"{len(answered)} responses written to {output}")
    elif options.file is None:
        print("" if streams else responses[0])
    else:
        for row in answered:
            print(json.dumps(row, ensure_ascii=False))


def read_rows(path: Path, fields: Iterable[Mapping[str, str]] = ()) -> dict[str, dict[str, str]]:
    """Rows with `instruction` and `input` from a text file (one a line), or a file that training could read, by place.

    Args:
        path: of the file.
        fields: other names that the two may have, as a task's `fields` gives them.

    Raises:
        InputError: with file and line (or row) where it can't be read.
    """
    names = [{"instruction": "instruction", "input": "input"}, *fields]
    rows = {place: _row(value, place, names) for place, value in _values(path)}
    if not rows:
        raise InputError(f"{path}: empty, wanted at least one instruction")
    return rows


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix != ".txt":
        kind = kind_of(path)
        if kind is None:
            raise InputError(f"--file: {path}: wanted one of {', '.join(['.txt', *READERS])}")
        yield from READERS[kind](path, None)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the mark that some editors put first
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read: {error}") from error
    # at line ends alone: `str.splitlines` parts a text at its U+2028 and U+0085 too
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", {"instruction": line}


def _row(value: Any, place: str, fields: Sequence[Mapping[str, str]]) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InputError(f"{place}: got {type(value).__name__}, wanted an object with instruction")
    names = next((names for names in fields if names["instruction"] in value), fields[0])
    instruction, context = value.get(names["instruction"]), value.get(names.get("input", "input")) or ""
    if not isinstance(instruction, str) or not instruction.strip():
        raise InputError(f"{place}: {names['instruction']}: got {instruction!r}, wanted text")
    if not isinstance(context, str):
        raise InputError(f"{place}: {names['input']}: got {context!r}, wanted text")
    return {"instruction": instruction, "input": context}
