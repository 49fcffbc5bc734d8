"""The model card of a saved adapter: PEFT alone can't load HyCAM, so the card says what to import."""

import os
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

_HEADING = "## Loading this HyCAM adapter"
_USAGE = f"""{_HEADING}

HyCAM lives outside PEFT: install it with `pip install hycam-kernels` and import `hycam` before PEFT loads the
adapter. Without the import PEFT stops with `KeyError: 'HYCAM'`.

```python
import hycam  # makes HyCAM known to PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/adapter")
```
"""


def write_usage(folder: str | os.PathLike) -> None:
    """Add the section to `folder`/README.md where it is missing, and make the card where there is none."""
    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData(library_name="peft"))
    if _HEADING not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{_USAGE}"
        card.save(path)
