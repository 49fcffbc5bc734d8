"""Bytes that a pass keeps for the backward, by count or by the device's allocator."""

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def release(device: torch.device) -> None:
    """Give back what nothing holds any more: models hold themselves in circles, and the allocator keeps blocks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def kept_bytes(call: Callable[[Any], Sequence[Tensor]], arguments: Mapping[str, Tensor]) -> int:
    """Bytes that stay for the backward after a forward, the arguments and the outputs left out.

    On CUDA what the allocator holds more than before; on a CPU the storages that autograd saves (torch.compile refuses
    to work under a dispatch mode such as `hycam.live_bytes.LiveBytes`).
    """
    if arguments["hidden"].device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        outputs = call(arguments)
        return torch.cuda.memory_allocated() - before - sum(output.untyped_storage().nbytes() for output in outputs)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = call(arguments)
    outside = {tensor.untyped_storage().data_ptr() for tensor in (*arguments.values(), *outputs)}
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in outside)
