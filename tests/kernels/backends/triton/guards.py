"""Memory in which a stray read spoils the result and a stray write shows."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# bytes that are NaN in each float format, and bytes that are a huge number in each
POISON, FENCE = 0xFF, 0xFB
BAND = 1024


class Guards:
    """Guarded tensors, and the check that nothing around them was written."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, Tensor, int]] = []

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device, gap: int = 0, around: int = FENCE) -> Tensor:
        """Poisoned tensor with a band on either side; its rows (last dimension) are ``gap`` elements apart."""
        width = shape[-1] if shape else 1
        rows = torch.Size(shape[:-1]).numel()
        count = rows * (width + gap) + 2 * BAND
        used = torch.zeros(count, dtype=torch.bool, device=device)
        used[BAND : count - BAND].view(rows, width + gap)[:, :width] = True
        buffer = torch.full((count, dtype.itemsize), around, dtype=torch.uint8, device=device)
        buffer[used] = POISON
        self.buffers.append((buffer, used, around))
        wide = buffer.view(dtype).view(-1)[BAND : count - BAND].view(rows, width + gap)
        return wide[:, :width].unflatten(0, shape[:-1]) if len(shape) > 1 else wide[0, :width].reshape(shape)

    def copy(self, tensor: Tensor, gap: int = 0) -> Tensor:
        """The tensor in poisoned surroundings."""
        guarded = self.empty(*tensor.shape, dtype=tensor.dtype, device=tensor.device, gap=gap, around=POISON)
        return guarded.copy_(tensor.detach())

    def check(self) -> None:
        for buffer, used, around in self.buffers:
            assert (buffer[~used] == around).all(), "written outside a tensor"


class GuardedAllocations(TorchDispatchMode):
    """Give guarded memory to every ``torch.empty`` and ``torch.empty_like`` of floats in the block."""

    def __init__(self, guards: Guards) -> None:
        super().__init__()
        self.guards = guards
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func not in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default) or not result.numel():
            return result
        if not result.is_floating_point():
            return result
        self.count += 1
        return self.guards.empty(*result.shape, dtype=result.dtype, device=result.device)
