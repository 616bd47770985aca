"""Physical memory in chunks, and ranges of addresses they are mapped into: the device's part.

    physical   | chunk 0 | chunk 1 | chunk 2 | chunk 3 | ...      fixed number, the budget
                    |         |
    range A    [ chunk 0 | reserved | reserved )
    range B    [ chunk 1 | reserved | reserved )                   addresses never move

CPU: pages of one memfd (`cpu.py`). CUDA: `cuMemCreate` handles (`cuda.py`). Chunks are mapped
whole; neighbouring chunks that go to neighbouring addresses are one call. Implementations do no
bookkeeping of owners; that is the ledger's part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class ChunkRun:
    """The chunks `[first, first + count)`."""

    first: int
    count: int


class FileRun(NamedTuple):
    """The bytes `[offset, offset + nbytes)` of a `shareable_file`."""

    offset: int
    nbytes: int


class VirtualRange(Protocol):
    """A reserved range of addresses. Touching a part that is not mapped is a fault."""

    @property
    def address(self) -> int:
        """First address; stays the same until `close`."""
        ...

    @property
    def reserved_bytes(self) -> int:
        """Length of the range, a multiple of the chunk size."""
        ...

    def map(self, position: int, run: ChunkRun) -> None:
        """Make `run` readable and writable from `address + position * chunk_bytes` on.

        What the chunks held is kept. Nothing may be mapped there yet. A chunk may be mapped at
        several places, so that it can change hands before its old mapping is taken away.

        Raises:
            DeviceMemoryError: the system refused; nothing is mapped then.
        """
        ...

    def unmap(self, position: int, count: int) -> None:
        """Take the mapping of `count` chunks away from `position` on; the chunks keep their bytes.

        Parts that are not mapped stay so.

        Raises:
            DeviceMemoryError: the system refused.
        """
        ...

    def populate(self, position: int, count: int) -> None:
        """Take now what the first touch of mapped chunks would cost, page by page, later."""
        ...

    def close(self) -> None:
        """Unmap everything and give the addresses back. Idempotent."""
        ...


class PhysicalMemory(Protocol):
    """The budget: `num_chunks` chunks of `chunk_bytes` bytes."""

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk."""
        ...

    @property
    def num_chunks(self) -> int:
        """Chunks of the budget."""
        ...

    @property
    def shareable_file(self) -> int | None:
        """A file that is the budget, chunk after chunk, and that nobody can shrink.

        Another process of this machine may map it. None where the device has nothing like that.
        """
        ...

    def reserve(self, nbytes: int) -> VirtualRange:
        """Reserve addresses for at least `nbytes`; takes no physical memory.

        Raises:
            DeviceMemoryError: no such range of addresses is free.
        """
        ...

    def discard(self, run: ChunkRun) -> None:
        """Forget what chunks hold, so that the system may use the memory until they are touched.

        They stay part of the budget. Must not be mapped anywhere.
        """
        ...

    def close(self) -> None:
        """Give the budget back; every range must be closed before. Idempotent."""
        ...
