"""The memory of a worker on the same host, as its peer sees it: mapped read only.

    worker A   budget: one sealed file  <--- mapped ---   worker B
               chunk 0 | chunk 1 | ...                    reads what A says it may, where A says

What lies where, and for how long, is agreed on by frames: nothing here keeps the owner from
writing. Both workers pass their files to each other when they open a link over shared memory, or
neither does.
"""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from services.worker.links.base import LinkError
from services.worker.memory.base import FileRun

_SEALS = fcntl.F_SEAL_SHRINK


def open_for_peers(file: int) -> int:
    """A descriptor of `file` that can only read, to be passed on and closed; raises LinkError."""
    try:
        return os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LinkError(f"this worker's memory cannot be shared: {error.strerror}") from error


class MappedPeerMemory:
    """Implements `PeerMemory`: a mapping of a worker's budget, there as long as any view of it."""

    def __init__(self, file: int) -> None:
        """Map a whole file, which may be closed afterwards.

        Raises:
            LinkError: it cannot be mapped, or could shrink, which would kill who reads it.
        """
        try:
            if not fcntl.fcntl(file, fcntl.F_GET_SEALS) & _SEALS:
                raise LinkError("the peer's memory is not sealed at its size")
            mapping = mmap.mmap(file, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise LinkError(f"the peer's memory cannot be mapped: {error}") from error
        self._bytes: NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)

    def view(self, run: FileRun) -> NDArray[np.uint8]:  # [nbytes]
        """The bytes of a run; ValueError where the file has no such bytes."""
        offset, nbytes = run
        if not 0 <= offset <= offset + nbytes <= len(self._bytes):
            raise ValueError(f"the peer's memory has no {nbytes} bytes at {offset}")
        return self._bytes[offset : offset + nbytes]
