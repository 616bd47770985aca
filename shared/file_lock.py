"""A lock between processes of one machine: whoever builds what all of them want."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_SECONDS = 0.1


@contextmanager
def file_lock(path: Path, deadline_seconds: float) -> Iterator[None]:
    """Hold an exclusive `flock` on `path`; the kernel drops it when the process dies.

    Raises:
        TimeoutError: another process has held it for `deadline_seconds`.
        OSError: the file cannot be made.
    """
    deadline = time.monotonic() + deadline_seconds
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise TimeoutError(
                        f"another process has held {path} for {deadline_seconds:.0f} s"
                    ) from error
                time.sleep(_POLL_SECONDS)
        yield
