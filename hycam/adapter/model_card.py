"""The model card of a saved adapter: PEFT alone can't load it, so the card says what to import."""

import os
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from hycam.adapter.peft_type import ForeignPeftType

_USAGE = """{heading}

The method lives outside PEFT: install it with `pip install hycam-kernels` and import `hycam` before PEFT loads the
adapter. Without the import PEFT stops with `KeyError: '{peft_type}'`.

```python
import hycam  # makes {name} known to PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/adapter")
```
"""


def write_usage(folder: str | os.PathLike, name: str, peft_type: ForeignPeftType) -> None:
    """Add the section on the method `name` to `folder`/README.md where it is missing; make the card if there is none.

    Args:
        folder: the saved adapter's.
        name: the method, as people write it.
        peft_type: the method's key in PEFT's registry.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData(library_name="peft"))
    heading = f"## Loading this {name} adapter"
    if heading not in card.text:
        usage = _USAGE.format(heading=heading, name=name, peft_type=peft_type.value)
        card.text = f"{card.text.rstrip()}\n\n{usage}"
        card.save(path)
