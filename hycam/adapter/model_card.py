"""The model card of a saved adapter: PEFT alone can't load it, so the card says what to import."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hycam.adapter.peft_type import ForeignPeftType

# The first line of the form that PEFT saves beside an adapter, for people to fill in.
_FORM = "# Model Card for Model ID"

_LOADING = """\
The method lives outside PEFT: install it with `pip install hycam-kernels` and import `hycam` before PEFT loads the
adapter. Without the import PEFT stops with `KeyError: '{peft_type}'`.

```python
import hycam  # makes {name} known to PEFT
{loading}
```"""

_LOADING_LINES = """\
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/adapter")"""

# PEFT's Auto classes read no GGUF file
_LOADING_LINES_ON_GGUF = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

backbone = AutoModelForCausalLM.from_pretrained("path/to/its/folder", gguf_file="{file}")
model = PeftModel.from_pretrained(backbone, "path/to/this/adapter")"""

_EVALUATING = """\
```bash
hycam eval --adapter path/to/this/adapter --task NAME=FILE  # perplexity, BLEU-4 and ROUGE-L of rows in a file
hycam exec lm-eval --model hf --model_args pretrained={base},peft=path/to/this/adapter --tasks TASKS
```"""


def write_usage(folder: str | os.PathLike, name: str, peft_type: ForeignPeftType) -> None:
    """Say in `folder`/README.md how to load and evaluate the method's adapter.

    The form that PEFT makes, with nothing filled in, gives way to a short card; what people wrote stays.

    Args:
        folder: the saved adapter's.
        name: the method, as people write it.
        peft_type: the method's key in PEFT's registry.
    """
    path = Path(folder) / "README.md"
    card = read_card(path)
    base = card.data.to_dict().get("base_model", "BACKBONE")
    begin(card, f"{name} adapter")
    lines = _LOADING_LINES_ON_GGUF.format(file=Path(base).name) if base.endswith(".gguf") else _LOADING_LINES
    loading = _LOADING.format(name=name, peft_type=peft_type.value, loading=lines)
    set_section(card, f"Loading this {name} adapter", loading, replace=False)
    set_section(card, f"Evaluating this {name} adapter", _EVALUATING.format(base=base), replace=False)
    card.save(path)


def read_card(path: Path) -> ModelCard:
    """The card in a file, or one that is yet to be written."""
    if path.exists():
        return ModelCard.load(path)
    return ModelCard(f"---\n{ModelCardData(library_name='peft').to_yaml()}\n---\n\n{_FORM}\n")


def begin(card: ModelCard, title: str) -> None:
    """Put a title, and a licence that is yet to be chosen, in the place of the form that nobody has filled in.

    A base model of this machine leaves the card's head: the hub takes no card that names a folder or file there.
    """
    if card.text.lstrip().startswith(_FORM):
        card.text = f"# {title}\n"
    data: Any = card.data  # its fields are those of ModelCardData
    data.license = data.license or "unknown"
    if isinstance(data.base_model, str) and not _is_on_hub(data.base_model):
        data.base_model = None
        data.tags = [tag for tag in data.tags or () if not tag.startswith("base_model:")] or None


def _is_on_hub(name: str) -> bool:
    """Whether a model's name can be one of the hub's, and isn't a folder or file here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def set_section(card: ModelCard, heading: str, body: str, *, replace: bool) -> None:
    """Give the card a section at its end, or another body to the one that it has where that is to be replaced."""
    title = f"## {heading}\n"
    before, found, after = f"{card.text.rstrip()}\n".partition(title)
    if found and not replace:
        return
    _, next_section, rest = after.partition("\n## ")
    card.text = f"{before.rstrip()}\n\n{title}\n{body}\n{next_section}{rest}"
