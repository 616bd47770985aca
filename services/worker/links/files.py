"""Descriptors that two processes share: memory of a size that nobody can change, and their end."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterable

from services.worker.links.base import LinkError

_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def create_sealed(name: str, nbytes: int) -> int:
    """A file descriptor of fresh memory; raises OSError."""
    file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, nbytes)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(file)
        raise
    return file


def map_sealed(file: int, nbytes: int) -> mmap.mmap:
    """Map a peer's file, or one's own; one that could shrink would kill this process with SIGBUS.

    Raises:
        LinkError: it is not sealed, of another size, or cannot be mapped.
    """
    try:
        sealed = fcntl.fcntl(file, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        if not sealed or os.fstat(file).st_size != nbytes:
            raise LinkError("the peer's shared memory is not sealed at the right size")
        return mmap.mmap(file, nbytes, mmap.MAP_SHARED)
    except OSError as error:
        raise LinkError(f"shared memory of a link cannot be mapped: {error}") from error


def close_all(files: Iterable[int]) -> None:
    """Close descriptors."""
    for file in files:
        os.close(file)
