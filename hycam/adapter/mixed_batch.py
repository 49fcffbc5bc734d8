"""A batch whose rows use different adapters: PEFT's `adapter_names`."""

from collections.abc import Collection
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor

from hycam.adapter.threads import PerThread
from hycam.errors import InputError

# PEFT's name for rows that use no adapter
BASE = "__base__"


class RowAdapters:
    """Which adapter each row of a batch uses.

    Args:
        names: an adapter's name for each row, or "__base__".
        repeats: how often `generate` repeats each row, for beams and for several returned sequences.
    """

    def __init__(self, names: Collection[str], repeats: int = 1) -> None:
        self._names = list(names)
        self._repeats = repeats
        self._rows: dict[tuple[int, torch.device], dict[str, Tensor]] = {}

    def rows(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """Adapter name -> indices [n] int64 of its rows, in a batch of `count`.

        Raises:
            InputError: (a ValueError) where there isn't one name for each row.
        """
        key = count, device
        if key not in self._rows:
            self._rows[key] = self._indices(count, device)
        return self._rows[key]

    def _indices(self, count: int, device: torch.device) -> dict[str, Tensor]:
        names = self._names
        if count == len(names) * self._repeats:
            names = [name for name in names for _ in range(self._repeats)]
        if count != len(names):
            raise InputError(f"adapter_names: got {len(names)} names for {count} rows, want one for each row")
        return {
            wanted: torch.tensor([index for index, name in enumerate(names) if name == wanted], device=device)
            for wanted in dict.fromkeys(names)
        }


class WrapperRows:
    """Forward hook of the modules that PEFT trains copies of: each row through its own adapter's copy.

    PEFT's own takes linear layers, embeddings and convolutions only, and no norms.
    """

    def __init__(self, row_adapters: PerThread[RowAdapters]) -> None:
        self._row_adapters = row_adapters

    def __call__(
        self, wrapper: AuxiliaryTrainingWrapper, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        row_adapters = self._row_adapters.get()
        if row_adapters is None or wrapper.disable_adapters:
            return None
        given, *others = args
        mixed = torch.empty_like(output)
        for name, rows in row_adapters.rows(given.shape[0], given.device).items():
            if name in wrapper._adapters:
                part = wrapper._forward_wrapped_mixed_batch(given[rows], name, *others, **kwargs)
            else:
                part = wrapper.original_module(given[rows], *others, **kwargs)
            mixed[rows] = part
        return mixed


def row_adapters_of(arguments: dict[str, Any], adapters: Collection[str], defaults: Any) -> RowAdapters:
    """Those of a call of forward or `generate` with these keyword `arguments`, checked.

    Args:
        arguments: the call's, `adapter_names` among them.
        adapters: names of the model's adapters.
        defaults: the model's own generation settings, or None.

    Raises:
        InputError: (a ValueError) where `adapter_names` aren't names of adapters.
    """
    names = arguments["adapter_names"]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise InputError(f"adapter_names: got {names!r}, want a list with the name of an adapter for each row")
    unknown = sorted(set(names) - set(adapters) - {BASE})
    if unknown:
        raise InputError(f"adapter_names: got {', '.join(unknown)}, want any of {', '.join(adapters)}, {BASE}")
    settings = arguments.get("generation_config") or defaults
    repeats = [
        arguments.get(name) or getattr(settings, name, None) or 1 for name in ("num_beams", "num_return_sequences")
    ]
    return RowAdapters(names, max(repeats))
