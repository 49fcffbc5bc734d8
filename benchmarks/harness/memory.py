"""Bytes that a pass needs: kept for the backward, by count or by the device's allocator, and the allocator's peak."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.op.peers import Arguments, Outputs, leaves, upstream


def release(device: torch.device) -> None:
    """Give back what nothing holds any more: models hold themselves in circles, and the allocator keeps blocks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def kept_bytes(call: Callable[[Arguments], Outputs], arguments: Arguments) -> int:
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


def peak_bytes(call: Callable[[Arguments], Outputs], arguments: Arguments) -> int:
    """Most that a forward and backward allocate on the CUDA device beyond what was there before, gradients included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call(arguments)
    grads = torch.autograd.grad(outputs, leaves(arguments), upstream(outputs))
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del grads
    return peak
