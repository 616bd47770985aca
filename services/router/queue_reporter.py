"""Queue reports: what waits in this router, to planners, while anything does."""

from __future__ import annotations

import asyncio

import structlog

from services.router.queue import WaitingQueue
from shared.bus.base import Bus, BusError
from shared.messages import QueueReport
from shared.subjects import Subjects

#: How often the queue is looked at.
INTERVAL_SECONDS = 0.1


class QueueReporter:
    """Publishes the length of the queue. Its owner runs `run` as a task."""

    def __init__(self, bus: Bus, subjects: Subjects, router_id: str, queue: WaitingQueue) -> None:
        self._bus = bus
        self._subject = subjects.queue(router_id)
        self._router_id = router_id
        self._queue = queue
        self._log = structlog.get_logger(component="queue")

    async def run(self) -> None:
        """Publish for ever: while requests wait, and once when none do any more."""
        is_told_empty = True
        while True:
            is_empty = len(self._queue) == 0
            if not (is_empty and is_told_empty):
                is_told_empty = await self._publish() and is_empty
            await asyncio.sleep(INTERVAL_SECONDS)

    async def _publish(self) -> bool:
        """False where the report could not be sent."""
        report = QueueReport(
            router_id=self._router_id,
            requests_waiting=len(self._queue),
            waiting_tokens=self._queue.num_tokens,
        )
        try:
            await self._bus.publish(self._subject, report.encode())
        except BusError as error:
            self._log.debug("queue report lost", reason=str(error))
            return False
        return True
