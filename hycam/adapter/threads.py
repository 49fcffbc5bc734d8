"""What belongs to one call of a model, where several threads call it at once."""

import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class _Slot(Generic[T]):
    def __init__(self) -> None:
        self.value: T | None = None


class PerThread(threading.local, Generic[T]):
    """A value of each thread's own, None at first. A copy of it, or a pickle, is empty.

    A call of a model runs in one thread, so do its pieces that checkpointing runs again for the backward pass. The
    value lies in an object of the thread's, since `torch.compile` loses what is written to a `threading.local` itself
    where its graph breaks.
    """

    def __init__(self) -> None:
        self._slot: _Slot[T] = _Slot()

    def get(self) -> T | None:
        return self._slot.value

    def set(self, value: T | None) -> None:
        self._slot.value = value

    def take(self) -> T | None:
        """The value, which is None from then on."""
        slot = self._slot
        value, slot.value = slot.value, None
        return value

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class Latest(Generic[T]):
    """The last value that the thread which asks has set; where it has set none, the last of any thread."""

    def __init__(self) -> None:
        self._of_thread: PerThread[T] = PerThread()
        self._of_any: T | None = None

    def get(self) -> T | None:
        own = self._of_thread.get()
        return self._of_any if own is None else own

    def set(self, value: T) -> None:
        self._of_thread.set(value)
        self._of_any = value
