"""Physical memory of a CPU worker: the pages of one memfd, mapped with mmap.

The file is as large as the budget and sparse: a page takes memory when it is first touched. A range
is an mmap of nothing (PROT_NONE); mapping a run of chunks is one mmap of a part of the file over
it, unmapping is one mmap of nothing over it, so the addresses are never up for grabs. Discarding
punches a hole into the file.

ctypes on libc, because Python's mmap module neither reserves nor maps at a given address.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref

from services.worker.memory.base import ChunkRun, VirtualRange
from services.worker.memory.errors import DeviceMemoryError, DeviceMemoryTooSmallError
from services.worker.memory.reserved import ReservedRange
from shared.errors import ConfigError

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_FALLOC_KEEP_SIZE_AND_PUNCH_HOLE = 0x01 | 0x02
_MADV_POPULATE_WRITE = 23
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_MAP_FAILED = ctypes.c_void_p(-1).value
_NOTHING = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


class _LibC:
    """The few calls needed, with their types; failures raise DeviceMemoryError."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self._mmap = library.mmap
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        ]
        self._munmap = library.munmap
        self._munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._madvise = library.madvise
        self._madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._fallocate = library.fallocate
        self._fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]

    def reserve(self, nbytes: int) -> int:
        """Map nothing at an address of the system's choice."""
        return self._map(None, nbytes, _PROT_NONE, _NOTHING, -1, 0, "reserve addresses for")

    def map_nothing(self, address: int, nbytes: int) -> None:
        """Map nothing at `address`, over whatever is there."""
        self._map(address, nbytes, _PROT_NONE, _NOTHING | _MAP_FIXED, -1, 0, "unmap")

    def map_file(self, address: int, nbytes: int, file: int, offset: int) -> None:
        """Map a part of `file` at `address`, over whatever is there."""
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_SHARED | _MAP_FIXED
        self._map(address, nbytes, protection, flags, file, offset, "map")

    def unmap(self, address: int, nbytes: int) -> None:
        """Give addresses back."""
        if self._munmap(address, nbytes) != 0:
            raise _failure("release addresses of", nbytes)

    def populate(self, address: int, nbytes: int) -> None:
        """Map all pages. A kernel before 5.14 does not know how: then each touch maps one."""
        self._madvise(address, nbytes, _MADV_POPULATE_WRITE)

    def punch_hole(self, file: int, offset: int, nbytes: int) -> None:
        """Drop a part of `file`; it reads as zeros afterwards."""
        mode = _FALLOC_KEEP_SIZE_AND_PUNCH_HOLE
        if self._fallocate(file, mode, offset, nbytes) != 0:
            raise _failure("discard", nbytes)

    def _map(
        self,
        address: int | None,
        nbytes: int,
        protection: int,
        flags: int,
        file: int,
        offset: int,
        verb: str,
    ) -> int:
        result: int | None = self._mmap(address, nbytes, protection, flags, file, offset)
        if result is None or result == _MAP_FAILED:
            raise _failure(verb, nbytes)
        return result


def _failure(verb: str, nbytes: int) -> DeviceMemoryError:
    reason = os.strerror(ctypes.get_errno())
    return DeviceMemoryError(f"cannot {verb} {nbytes} bytes of memory: {reason}")


class CpuMemory:
    """A budget of `num_chunks` chunks in the worker's own memory."""

    def __init__(self, budget_bytes: int, chunk_bytes: int) -> None:
        """Create the budget, rounded down to whole chunks; takes no memory until it is touched.

        Raises:
            ConfigError: the chunk is not a multiple of the page, or the budget is below one chunk.
            DeviceMemoryError: the system refuses a file of that size.
        """
        if chunk_bytes < mmap.PAGESIZE or chunk_bytes % mmap.PAGESIZE:
            raise ConfigError(
                f"a chunk of {chunk_bytes} bytes is no multiple of the {mmap.PAGESIZE}-byte page"
            )
        if budget_bytes < chunk_bytes:
            raise DeviceMemoryTooSmallError(
                f"device memory of {budget_bytes} bytes is less than a chunk of {chunk_bytes}"
            )
        self._chunk_bytes = chunk_bytes
        self._num_chunks = budget_bytes // chunk_bytes
        self._libc = _LibC()
        nbytes = self._num_chunks * chunk_bytes
        try:
            flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
            self._file = os.memfd_create("kunserve-memory", flags)
            self._closer = weakref.finalize(self, os.close, self._file)
            os.truncate(self._file, nbytes)
            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            raise DeviceMemoryError(
                f"cannot create {nbytes} bytes of memory: {error.strerror}"
            ) from error

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk."""
        return self._chunk_bytes

    @property
    def num_chunks(self) -> int:
        """Chunks of the budget."""
        return self._num_chunks

    @property
    def shareable_file(self) -> int:
        """The file: a peer that maps it cannot be killed by its end, for its size is sealed."""
        return self._file

    @property
    def resident_bytes(self) -> int:
        """Memory the budget really takes now: pages touched and not discarded."""
        return os.fstat(self._file).st_blocks * 512

    def reserve(self, nbytes: int) -> VirtualRange:
        """Reserve addresses for at least `nbytes`."""
        return CpuRange(self._libc, self._file, self._chunk_bytes, nbytes)

    def discard(self, run: ChunkRun) -> None:
        """Give the pages of `run` back to the system; they read as zeros afterwards."""
        offset, nbytes = run.first * self._chunk_bytes, run.count * self._chunk_bytes
        self._libc.punch_hole(self._file, offset, nbytes)

    def close(self) -> None:
        """Close the file; its pages are freed once no range maps them."""
        self._closer()


class CpuRange(ReservedRange):
    """A reserved range of addresses; made by `CpuMemory.reserve`."""

    def __init__(self, libc: _LibC, file: int, chunk_bytes: int, nbytes: int) -> None:
        super().__init__(nbytes, chunk_bytes, libc.reserve)
        self._libc = libc
        self._file = file
        self._closer = weakref.finalize(self, libc.unmap, self.address, self.reserved_bytes)

    def map(self, position: int, run: ChunkRun) -> None:
        """Map `run` from the `position`-th chunk of the range on."""
        address, nbytes = self._part(position, run.count)
        self._libc.map_file(address, nbytes, self._file, run.first * self._chunk_bytes)

    def unmap(self, position: int, count: int) -> None:
        """Map nothing over `count` chunks from `position` on."""
        address, nbytes = self._part(position, count)
        self._libc.map_nothing(address, nbytes)

    def populate(self, position: int, count: int) -> None:
        """Map the pages of `count` chunks from `position` on, a quarter of what faults would take.

        Pages that the file does not have yet are allocated, too.
        """
        self._libc.populate(*self._part(position, count))

    def close(self) -> None:
        """Give the addresses back."""
        self._closer()

    def _part(self, position: int, count: int) -> tuple[int, int]:
        if not self._closer.alive:
            raise ValueError("the range is closed")
        return super()._part(position, count)
