"""The seam between the pipeline and what carries its tensors.

A channel joins two devices, one on each side of a link. Whoever sends a tensor puts what `pack` or
`put` gives into one frame of the same class; whoever gets that frame asks its channel for the
tensor. What must hold, and what each side may rely on:

- Frames of one class are sent in the order in which their tensors were packed.
- Every frame that arrives is unpacked, in the order of its class, also one that nobody wants: a
  tensor that nobody takes holds the place of another one.
- Packing and unpacking order the device's work, on the stream that is current there, and never wait
  for it on the host. What is launched after `pack` may overwrite the tensor.
- The peer may die at any moment, and what it promised never comes. The device must not wait for
  ever, so some time after the link went down it goes on, with garbage. Whoever passes on, or keeps,
  what was made of a received tensor looks whether the link is up when the device has made it.

Workers of several ranks have a channel for each pair of ranks that exchange tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from services.worker.links.base import Buffer, LinkClass, LinkError

if TYPE_CHECKING:  # links know channels, but no torch
    import torch


class ChannelKind(StrEnum):
    """What carries tensors; a better one comes first."""

    CUDA_IPC = "cuda_ipc"  # between GPUs of one host, or on one
    NCCL = "nccl"  # between GPUs of any hosts
    HOST = "host"  # in the frames themselves


class Direction(StrEnum):
    """Seen from this worker."""

    SENT = "sent"
    RECEIVED = "received"


#: The buffers of a frame that stand for one tensor.
Packed = Sequence[Buffer]

#: Launches what fills a place `[nbytes]` of bytes on the device.
Write = Callable[["torch.Tensor"], object]

#: Bytes of tensors, by what carried them.
Traffic = Mapping[tuple[ChannelKind, Direction], int]


class ChannelError(LinkError):
    """A channel of some kind cannot be had, or was used in a way it does not allow."""


class TensorChannel(Protocol):
    """Carries tensors beside, or in, the frames of one link. The engine thread's, but for two."""

    @property
    def kind(self) -> ChannelKind:
        """What carries the tensors."""
        ...

    @property
    def part_bytes(self) -> int:
        """Into what parts bulk is best cut; equal at both ends. None may be larger for `put`."""
        ...

    def has_room(self, link_class: LinkClass) -> bool:
        """True if `put` takes something of a bulk class now."""
        ...

    def pack(self, tensor: torch.Tensor, link_class: LinkClass) -> Packed:
        """Send a contiguous tensor; what comes back goes into a frame of that class.

        It is never refused: what the channel has no place for goes in the frame.

        Raises:
            LinkDownError: the channel was aborted already.
        """
        ...

    def put(self, nbytes: int, link_class: LinkClass, write: Write) -> Packed:
        """The same with a tensor of bytes that `write` makes, in the place it is sent from.

        Raises:
            ChannelError: there is no room, or not for so many bytes.
            LinkDownError: as above.
        """
        ...

    def received(self, packed: Packed) -> AbstractContextManager[torch.Tensor]:  # [nbytes] uint8
        """The tensor of a frame, on this device, for what is launched within the context.

        It may be overwritten there, and belongs to the channel again afterwards.

        Raises:
            ChannelError: nothing that the peer can have packed.
            LinkDownError: it was aborted already.
        """
        ...

    def traffic(self) -> Traffic:
        """Bytes of tensors so far. From any thread."""
        ...

    def abort(self) -> None:
        """Soon let nothing here wait for the peer any more. Idempotent, from any thread.

        The link is down already. It takes as long as others may need to notice that theirs is, too.
        """
        ...

    def close(self) -> None:
        """Give everything back, as soon as the device and the peer have let it go. Idempotent."""
        ...
