"""Tensors in the frames of a link: all that workers without a GPU need, and what always works.

CPU     the frame's buffer is the tensor's memory, at both ends; nothing is copied here
CUDA    device -> pinned host memory -> frame ~~~ frame -> pinned host memory -> device

A frame's bytes must be there when it is sent, so on a GPU packing waits for the copy. This is the
one channel that does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from services.worker.channels.base import (
    ChannelError,
    ChannelKind,
    Direction,
    Packed,
    Traffic,
    Write,
)
from services.worker.links.base import LinkClass

#: Large for a frame, small for the caches and the allocator.
_PART_BYTES = 1024 * 1024


class HostChannel:
    """Implements `TensorChannel` for any device of torch."""

    kind = ChannelKind.HOST
    part_bytes = _PART_BYTES

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._num_bytes = dict.fromkeys(Direction, 0)

    def has_room(self, link_class: LinkClass) -> bool:
        """Always: the link in front of the frames says when it has enough."""
        return True

    def pack(self, tensor: torch.Tensor, link_class: LinkClass) -> Packed:
        """The tensor's own memory on the CPU, else a copy."""
        self._num_bytes[Direction.SENT] += tensor.nbytes
        content = tensor.flatten().view(torch.uint8)
        if self._device.type == "cpu":
            return (_memory_of(content),)
        pinned = torch.empty(len(content), dtype=torch.uint8, pin_memory=True)
        pinned.copy_(content, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return (_memory_of(pinned),)

    def put(self, nbytes: int, link_class: LinkClass, write: Write) -> Packed:
        """Write into memory that becomes the frame's, or is copied there."""
        place = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        write(place)
        return self.pack(place, link_class)

    @contextmanager
    def received(self, packed: Packed) -> Iterator[torch.Tensor]:  # [nbytes] uint8
        """The buffer itself on the CPU, else a copy that what is launched next finds done."""
        try:
            content = torch.frombuffer(packed[0], dtype=torch.uint8)
        except (IndexError, ValueError) as error:
            raise ChannelError(f"a frame came without its tensor: {error}") from error
        self._num_bytes[Direction.RECEIVED] += len(content)
        if self._device.type != "cpu":
            content = content.pin_memory().to(self._device, non_blocking=True)
        yield content

    def traffic(self) -> Traffic:
        """Bytes of tensors so far."""
        return Counter({(self.kind, each): count for each, count in self._num_bytes.items()})

    def abort(self) -> None:
        """Nothing here waits for the peer."""

    def close(self) -> None:
        """There is nothing to give back."""


def _memory_of(content: torch.Tensor) -> memoryview:  # [nbytes] uint8
    """A view that keeps the memory."""
    return content.numpy().data.cast("B")
