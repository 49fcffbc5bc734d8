"""Makes this package's methods known to PEFT.

PEFT has no plugin mechanism, and its `register_peft_method` takes members of a closed enum only; its dispatch tables
are plain dictionaries, which this fills. PEFT's mixed models and its hot-swap have closed lists of their own, without
these methods.
"""

from typing import Any, cast

from peft import PeftConfig, mapping
from peft.tuners.tuners_utils import BaseTuner

from .config import HyCAMConfig
from .methods import MoeLoraConfig, MoeLoraModel, MultiLoraConfig, MultiLoraModel
from .peft_type import HYCAM, MOELORA, MULTILORA, ForeignPeftType
from .tuner import HyCAMModel

_METHODS: dict[ForeignPeftType, tuple[type[PeftConfig], type[BaseTuner]]] = {
    HYCAM: (HyCAMConfig, HyCAMModel),
    MULTILORA: (MultiLoraConfig, MultiLoraModel),
    MOELORA: (MoeLoraConfig, MoeLoraModel),
}


def register() -> None:
    """Put the methods into PEFT's tables; a second time does no harm."""
    for peft_type, (config, tuner) in _METHODS.items():
        cast(dict[str, Any], mapping.PEFT_TYPE_TO_CONFIG_MAPPING)[peft_type] = config
        cast(dict[str, Any], mapping.PEFT_TYPE_TO_TUNER_MAPPING)[peft_type] = tuner
        cast(dict[str, Any], mapping.PEFT_TYPE_TO_PREFIX_MAPPING)[peft_type] = tuner.prefix
