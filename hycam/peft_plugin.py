"""Makes HyCAM known to PEFT.

PEFT has no plugin mechanism, and its `register_peft_method` takes members of a closed enum only; its dispatch tables
are plain dictionaries, which this fills. PEFT's mixed models and its hot-swap have closed lists of their own, without
HyCAM.
"""

from typing import Any, cast

from peft import mapping

from .config import HyCAMConfig
from .peft_type import HYCAM
from .tuner import HyCAMModel


def register() -> None:
    """Put HyCAM into PEFT's tables; a second time does no harm."""
    cast(dict[str, Any], mapping.PEFT_TYPE_TO_CONFIG_MAPPING)[HYCAM] = HyCAMConfig
    cast(dict[str, Any], mapping.PEFT_TYPE_TO_TUNER_MAPPING)[HYCAM] = HyCAMModel
    cast(dict[str, Any], mapping.PEFT_TYPE_TO_PREFIX_MAPPING)[HYCAM] = HyCAMModel.prefix
