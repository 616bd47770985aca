"""How long layers ran: known when the device is done with them, which may be long after the call.

call      | forward | forward |                look
device              |  layers ......... |  layers ......... |
                    ^ began       ended ^ = began of the next one
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from services.worker.engine.cost_model import ChunkShape
from services.worker.meter import EngineMeter
from services.worker.model.queues.base import DeviceQueue, Mark
from services.worker.work_pacer import BatchActivity


class _Run(NamedTuple):
    began: Mark
    ended: Mark
    chunks: Sequence[ChunkShape]
    num_layers: int


class RunTimes:
    """Tells meter and activity of layers that ran. Engine thread only."""

    def __init__(self, queue: DeviceQueue, meter: EngineMeter, activity: BatchActivity) -> None:
        self._queue = queue
        self._meter = meter
        self._activity = activity
        self._running: deque[_Run] = deque()

    def launched(self, began: Mark, chunks: Sequence[ChunkShape], num_layers: int) -> None:
        """Take note of layers of a batch, launched since the mark `began`."""
        self._running.append(_Run(began, self._queue.mark(), chunks, num_layers))
        self.look()

    def look(self) -> None:
        """Count what the device has done since the last look."""
        while self._running and self._running[0].ended.is_reached:
            run = self._running.popleft()
            seconds = run.ended.seconds_since(run.began)
            self._activity.ran(seconds, time.perf_counter())
            self._meter.computed(run.chunks, run.num_layers, seconds)
        self._activity.is_running = bool(self._running)
