"""Whose blocks other workers shall free, until it is known that they have.

Every batch tells the stages of its route all that they have not confirmed, and confirms it when it
returns. So a stage always knows what is free before a batch needs it, whichever way the batch came;
being told twice does no harm, because a key never comes back (see `KvKey`). Workers that no batch
visits are told by a message of their own, which they answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.worker.engine.request import KvKey
from services.worker.engine.routes import WorkerId

#: Keys to free, by worker.
ReleasedKeys = Mapping[WorkerId, tuple[KvKey, ...]]


class Releases:
    """Released keys that are not confirmed, by worker."""

    def __init__(self) -> None:
        self._pending: dict[WorkerId, dict[KvKey, None]] = {}  # a dict keeps the order

    def add(self, worker_id: WorkerId, key: KvKey) -> None:
        """A worker shall free what `key` holds."""
        self._pending.setdefault(worker_id, {})[key] = None

    def pending(self, worker_ids: Iterable[WorkerId] | None = None) -> ReleasedKeys:
        """What these workers, or all, have not confirmed; who has nothing to free is left out."""
        chosen = tuple(self._pending) if worker_ids is None else worker_ids
        return {w: tuple(self._pending[w]) for w in chosen if self._pending.get(w)}

    def confirm(self, released: ReleasedKeys) -> None:
        """The workers have freed these."""
        for worker_id, keys in released.items():
            pending = self._pending.get(worker_id, {})
            for key in keys:
                pending.pop(key, None)
            if not pending:
                self._pending.pop(worker_id, None)

    def forget_worker(self, worker_id: WorkerId) -> None:
        """A worker is gone, and its blocks with it."""
        self._pending.pop(worker_id, None)
