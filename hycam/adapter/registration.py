"""Makes methods from outside PEFT known to it.

PEFT has no plugin mechanism, and its `register_peft_method` takes members of a closed enum only; its dispatch tables
are plain dictionaries, which this fills. PEFT's mixed models and its hot-swap have closed lists of their own, without
these methods.
"""

from typing import Any, cast

from peft import PeftConfig, mapping
from peft.tuners.tuners_utils import BaseTuner

from hycam.adapter.peft_type import ForeignPeftType


def register(peft_type: ForeignPeftType, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Put a method into PEFT's tables; a second time does no harm."""
    cast(dict[str, Any], mapping.PEFT_TYPE_TO_CONFIG_MAPPING)[peft_type] = config
    cast(dict[str, Any], mapping.PEFT_TYPE_TO_TUNER_MAPPING)[peft_type] = tuner
    cast(dict[str, Any], mapping.PEFT_TYPE_TO_PREFIX_MAPPING)[peft_type] = tuner.prefix
