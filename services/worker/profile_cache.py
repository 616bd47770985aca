"""Keeps what `profile_model` measured, so that only the first start on a machine takes the time.

    <directory>/<key>.json    key: hash of the model, kernels, threads, processor and limits
    <directory>/<key>.lock    held while measuring: several workers that start share one result

A file that cannot be read as a profile counts as missing and is written anew, in one piece. Called
in the engine thread, before the worker serves.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import structlog

from services.worker.engine.cost_model import CostModelError
from services.worker.engine.profile import ModelProfile
from shared.file_lock import file_lock

#: After that a worker measures for itself, whatever the others do.
_LOCK_SECONDS = 20.0


def profile_key(*parts: str | bytes | int) -> str:
    """A file name for everything that a profile depends on."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()[:16]


class ProfileCache:
    """Profiles in one directory."""

    def __init__(self, directory: Path, lock_seconds: float = _LOCK_SECONDS) -> None:
        """Use `directory`, which need not exist."""
        self._directory = directory
        self._lock_seconds = lock_seconds
        self._log = structlog.get_logger(component="profile")

    def get(self, key: str, measure: Callable[[], ModelProfile]) -> ModelProfile:
        """The profile of `key`: from the cache, or measured and kept for the next start.

        A directory that cannot be written costs every start the measurement, and nothing else.

        Raises:
            CostModelError: `measure` did.
        """
        profile = self._read(key)
        if profile is not None:
            return profile
        with ExitStack() as stack:
            self._lock_if_possible(key, stack)
            profile = self._read(key)
            if profile is None:
                profile = measure()
                self._write(key, profile)
        return profile

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.json"

    def _read(self, key: str) -> ModelProfile | None:
        path = self._path(key)
        try:
            return ModelProfile.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, CostModelError) as error:
            self._log.warning("profile ignored", path=str(path), reason=str(error))
            return None

    def _write(self, key: str, profile: ModelProfile) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f"{key}-", dir=self._directory)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(profile.to_json())
            os.replace(name, self._path(key))
        except OSError as error:
            self._log.warning("profile not kept", reason=str(error))

    def _lock_if_possible(self, key: str, stack: ExitStack) -> None:
        """Be alone on this machine until `stack` closes, if that can be had in time."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(self._directory / f"{key}.lock", self._lock_seconds))
        except OSError as error:  # a TimeoutError is one
            self._log.debug("measured without a lock", reason=str(error))
