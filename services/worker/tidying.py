"""When a worker does what its memory has put off. Engine thread.

Populating what was mapped saves time to those who use it soon, and unmapping what is stale is to be
done some day; neither must hold up batches, or, while the layout changes, bytes on their way.
"""

from __future__ import annotations

import time

from services.worker.memory.pool import MemoryPool
from services.worker.work_pacer import BatchActivity, WorkPacer

#: Share of the time while batches run, and the most between two of them.
_SHARE = 0.1
_MOST_SECONDS = 0.005


class Tidying:
    """Calls `MemoryPool.tidy` between batches."""

    def __init__(self, pool: MemoryPool, activity: BatchActivity) -> None:
        self._pool = pool
        self._pacer = WorkPacer(time.perf_counter(), _SHARE, activity)

    @property
    def is_due(self) -> bool:
        """True while `pump` has something to do."""
        return not self._pool.is_tidy

    def pump(self) -> None:
        """Tidy for as long as it may take now."""
        if not self.is_due:
            return
        now = time.perf_counter()
        ends_at = now + min(self._pacer.grant(now), _MOST_SECONDS)
        while self.is_due and now < ends_at:
            self._pool.tidy()
            now = time.perf_counter()
        self._pacer.used(now)
