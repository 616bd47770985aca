"""A cache of directories that are built once and appear whole or not at all.

Called by `shared.models.resolve`. Several processes may want the same entry at once: the first
builds it under a file lock, the others wait for the lock and then find it.

    <cache>/models/.<key>.lock       held while building
    <cache>/models/.<key>.partial/   being built; removed by the next builder after a crash
    <cache>/models/<key>/            complete: it got this name by rename, after fsync
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from shared.file_lock import file_lock
from shared.models.errors import ModelSourceError


def build_once(entry: Path, build: Callable[[Path], None], *, deadline_seconds: float) -> Path:
    """Returns `entry`, calling `build(directory)` to make it unless it is there already.

    Waits at most `deadline_seconds` for another process that builds it. Raises `ModelSourceError`
    when the cache cannot be written or the wait is over.
    """
    try:
        if entry.is_dir():
            return entry
        entry.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(entry.parent / f".{entry.name}.lock", deadline_seconds):
            if not entry.is_dir():
                _build(entry, build)
    except TimeoutError as error:
        raise ModelSourceError(
            f"{error} while converting the model; look at that process, then start again"
        ) from error
    except OSError as error:
        raise ModelSourceError(_describe(error, entry)) from error
    return entry


def _build(entry: Path, build: Callable[[Path], None]) -> None:
    partial = entry.parent / f".{entry.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        build(partial)
        for file in partial.iterdir():
            _fsync(file)
        _fsync(partial)
        partial.rename(entry)
        _fsync(entry.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(error: OSError, entry: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"no room in {entry.parent} to convert the model ({error.strerror}); free some space"
            " or choose another cache directory"
        )
    return (
        f"cannot write the converted model to {entry.parent}: {error.strerror}; choose a cache"
        " directory that can be written"
    )
