"""The seam to NCCL, and NCCL through CuPy; streams and events are torch's.

CuPy has no communicator that does not block, so nothing here is called from a thread that others
wait for without a deadline: see `nccl.py`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from services.worker.channels.base import ChannelError


class Event(Protocol):
    """A moment on a stream."""

    def query(self) -> bool:
        """True once the device is past it."""
        ...


class Stream(Protocol):
    """What `torch.cuda.Stream` has, as far as it is needed."""

    def record_event(self) -> Any:
        """The moment after all that was launched so far; an Event."""
        ...

    def wait_event(self, event: Any) -> None:
        """Let what is launched next wait for a moment on another stream."""
        ...

    def synchronize(self) -> None:
        """Wait on the host for all that was launched so far."""
        ...


class Communicator(Protocol):
    """Two ranks, of which the one only sends and the other only receives."""

    def send(self, tensor: torch.Tensor, stream: Stream) -> None:
        """Launch a send; it ends when the peer has received."""
        ...

    def receive(self, tensor: torch.Tensor, stream: Stream) -> None:
        """Launch a receive of exactly what the peer sends."""
        ...

    def abort(self) -> None:
        """End everything that was launched, in any thread; may hang itself."""
        ...


class NcclLibrary(Protocol):
    """Every refusal is a RuntimeError."""

    @property
    def version(self) -> int:
        """Both ends must have the same."""
        ...

    def attach(self) -> None:
        """Let the calling thread use the device."""
        ...

    def unique_id(self) -> bytes:
        """What the two ranks of one communicator find each other by."""
        ...

    def communicator(self, unique_id: bytes, rank: int) -> Communicator:
        """Rank 0 or 1 of two; returns when the other one has come, which may be never."""
        ...

    def stream(self) -> Stream:
        """A new one, beside all others."""
        ...

    def current_stream(self) -> Stream:
        """Of the calling thread."""
        ...


class CupyNccl:
    """Implements `NcclLibrary`. Never run on GPUs yet."""

    def __init__(self, device: torch.device) -> None:
        """Raises ImportError where there is no CuPy or no NCCL."""
        from cupy.cuda import nccl

        self._nccl: Any = nccl
        self._device = device
        self.version = int(nccl.get_version())

    def attach(self) -> None:
        """Make the device torch's and the runtime's own in this thread."""
        torch.cuda.set_device(self._device)

    def unique_id(self) -> bytes:
        """128 bytes, with the address where this process listens."""
        return bytes(self._nccl.get_unique_id())

    def communicator(self, unique_id: bytes, rank: int) -> Communicator:
        """Blocks."""
        return _CupyCommunicator(self._nccl, unique_id, rank)

    def stream(self) -> Stream:
        """One that does not wait for the default stream."""
        make: Any = torch.cuda.Stream  # untyped
        stream: Stream = make(self._device)
        return stream

    def current_stream(self) -> Stream:
        """Of torch."""
        return torch.cuda.current_stream(self._device)


class _CupyCommunicator:
    """Implements `Communicator`."""

    def __init__(self, nccl: Any, unique_id: bytes, rank: int) -> None:
        self._type = nccl.NCCL_UINT8
        self._peer = 1 - rank
        self._communicator: Any = nccl.NcclCommunicator(2, unique_id, rank)

    def send(self, tensor: torch.Tensor, stream: Stream) -> None:
        self._communicator.send(*self._arguments(tensor, stream))

    def receive(self, tensor: torch.Tensor, stream: Stream) -> None:
        self._communicator.recv(*self._arguments(tensor, stream))

    def abort(self) -> None:
        self._communicator.abort()

    def _arguments(self, tensor: torch.Tensor, stream: Any) -> tuple[int, int, int, int, int]:
        """Address, count, type, peer, stream."""
        return tensor.data_ptr(), tensor.nbytes, self._type, self._peer, stream.cuda_stream


def load_nccl(device: torch.device) -> NcclLibrary:
    """NCCL on `device`; raises ChannelError, which says what is missing."""
    try:
        return CupyNccl(device)
    except (ImportError, RuntimeError) as error:
        raise ChannelError(f"NCCL cannot be used: {error}") from error
