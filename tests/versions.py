"""What a test needs of the installed versions beyond what the package promises."""

import peft
import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

transformers_takes_this_peft = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers' own load_adapter and add_adapter want PEFT {MIN_PEFT_VERSION}",
)
