"""What the settings of every method here share once they are saved: the format's version, and the model card."""

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from peft.config import PeftConfig

from hycam.adapter.model_card import write_usage
from hycam.adapter.peft_type import ForeignPeftType
from hycam.errors import check_format_version

# Of adapter_config.json and the tensors beside it. What an earlier version would read wrongly raises it; what that can
# leave out doesn't.
FORMAT_VERSION = 1

# Fields that say nothing about the computation, or are filled in by PEFT.
_FREE_FIELDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "format_version",
    "fuse_norm",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
}


@dataclass
class SavedConfig(PeftConfig):
    """Settings of an adapter, as `save_pretrained` writes them.

    Args:
        format_version: of the saved adapter, for the versions of this package that read it; a file without it is of
            version 1.

    Raises:
        InputError: (a ValueError) for a file that a later version of this package wrote.
    """

    format_version: int = field(default=FORMAT_VERSION, kw_only=True)

    method_name: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format_version(self.format_version, FORMAT_VERSION, "adapter_config.json: ")

    def differing(self, other: PeftConfig) -> dict[str, tuple[Any, Any]]:
        """Name -> both values of the fields in which the computation or the parameters of `other` differ, sorted."""
        ours, theirs = self.to_dict(), other.to_dict()
        return {
            name: (ours[name], theirs[name])
            for name in sorted(ours)
            if name not in _FREE_FIELDS and _comparable(ours[name]) != _comparable(theirs[name])
        }

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write adapter_config.json as PEFT does, and into the folder's model card what a reader must import first."""
        super().save_pretrained(str(save_directory), **kwargs)
        write_usage(save_directory, self.method_name, cast(ForeignPeftType, self.peft_type))


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list | tuple) else value
