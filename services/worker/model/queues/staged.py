"""The queue of a device that computes by itself: many small arrays travel as one copy.

    buffer 0  [ positions | slots | block table | ... ]  its copy is under way: nobody writes here
    buffer 1  [ positions | slots | ...                  the next batch

The device copies from a buffer some time later. It is written again when the mark behind that copy
is reached; until then another one is used, so nobody waits. There are as many as copies were ever
under way at once: about two for each batch in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from services.worker.model.queues.base import Array, Fetch, Mark

#: Where an array begins in a buffer: kernels compiled for aligned addresses need 16.
_ALIGNMENT_BYTES = 64
_LEAST_BUFFER_BYTES = 256 * 1024
_TORCH_TYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


class Copier(Protocol):
    """The calls of a device that the queue is made of; none of them waits."""

    def pinned(self, nbytes: int) -> torch.Tensor:  # [nbytes] uint8
        """Memory of the host that the device can copy from while the host goes on."""
        ...

    def upload(self, source: torch.Tensor) -> torch.Tensor:
        """A copy on the device of pinned memory, which must stay as it is until it is made."""
        ...

    def download(self, source: torch.Tensor) -> torch.Tensor:
        """A copy on the host, undefined until the device has made it."""
        ...

    def mark(self) -> Mark:
        """A point behind all that was asked so far."""
        ...


@dataclass(slots=True)
class _Buffer:
    memory: torch.Tensor  # [nbytes] uint8, pinned
    copied: Mark | None = None  # behind its last copy

    @property
    def is_free(self) -> bool:
        """True if it may be written."""
        return self.copied is None or self.copied.is_reached


class StagedQueue:
    """Implements `DeviceQueue`."""

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._buffers: list[_Buffer] = []

    def place(self, arrays: Sequence[Array]) -> list[torch.Tensor]:
        """Pack the arrays into a buffer that may be written, and copy that."""
        starts, nbytes = [], 0
        for array in arrays:
            starts.append(nbytes)
            nbytes += -(-array.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        buffer = self._free_buffer(nbytes)
        packed = buffer.memory.numpy()
        for array, start in zip(arrays, starts, strict=True):
            values = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            packed[start : start + array.nbytes] = values
        copy = self._copier.upload(buffer.memory[:nbytes])
        buffer.copied = self._copier.mark()
        return [
            copy[start : start + array.nbytes].view(_TORCH_TYPES[array.dtype]).view(array.shape)
            for array, start in zip(arrays, starts, strict=True)
        ]

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetch:
        """Begin to copy `tensors` to the host."""
        copies = [self._copier.download(tensor) for tensor in tensors]
        return Fetch(copies, self._copier.mark())

    def mark(self) -> Mark:
        """A point behind all that was asked so far."""
        return self._copier.mark()

    def _free_buffer(self, nbytes: int) -> _Buffer:
        """One of `nbytes` at least that may be written; a new one where there is none."""
        free = [buffer for buffer in self._buffers if buffer.is_free]
        fitting = next((buffer for buffer in free if buffer.memory.numel() >= nbytes), None)
        if fitting is not None:
            return fitting
        if free:  # a larger one takes its place
            self._buffers.remove(free[0])
        size = max(_LEAST_BUFFER_BYTES, 1 << (nbytes - 1).bit_length())
        self._buffers.append(_Buffer(self._copier.pinned(size)))
        return self._buffers[-1]
