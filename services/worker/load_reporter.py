"""Load reports: the worker's figures to routers and planners, periodically and when they change."""

from __future__ import annotations

import asyncio

import structlog

from services.worker.engine.outputs import SchedulerLoad
from services.worker.identity import ModelFacts
from services.worker.member_state import Placement
from shared.bus.base import Bus, BusError
from shared.messages import LoadReport
from shared.subjects import Subjects

#: Reports on change are not sent faster than this.
_MIN_GAP_SECONDS = 0.02


class LoadReporter:
    """Publishes the newest load. Its owner runs `run` as a task."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        worker_id: str,
        facts: ModelFacts,
        placement: Placement,
    ) -> None:
        self._bus = bus
        self._subject = subjects.load(worker_id)
        self._worker_id = worker_id
        self._facts = facts
        self._placement = placement
        self._load = SchedulerLoad(
            kv_blocks_total=facts.num_blocks,
            kv_blocks_used=0,
            requests_running=0,
            requests_waiting=0,
            waiting_blocks=0,
            num_preemptions=0,
            engine_steps=0,
        )
        self._received: dict[str, int] = {}
        self._is_draining = False
        self._changed = asyncio.Event()
        self._log = structlog.get_logger(component="load")

    def update(self, load: SchedulerLoad, received: dict[str, int]) -> None:
        """Take new figures; they are sent soon."""
        self._load, self._received = load, received
        self._changed.set()

    def set_draining(self) -> None:
        """Say from now on that the worker takes nothing new."""
        self._is_draining = True
        self._changed.set()

    def wake(self) -> None:
        """Send a report soon."""
        self._changed.set()

    async def run(self, interval_seconds: float) -> None:
        """Publish for ever: every `interval_seconds`, and soon after a change."""
        while True:
            self._changed.clear()
            await self._publish()
            await asyncio.sleep(_MIN_GAP_SECONDS)
            try:
                async with asyncio.timeout(max(0.0, interval_seconds - _MIN_GAP_SECONDS)):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _publish(self) -> None:
        load = self._load
        report = LoadReport(
            worker_id=self._worker_id,
            group_id=self._placement.group_id,
            epoch=self._placement.epoch,
            block_size=self._facts.block_size,
            kv_blocks_total=load.kv_blocks_total,
            kv_blocks_used=load.kv_blocks_used,
            requests_running=load.requests_running,
            requests_waiting=load.requests_waiting,
            waiting_blocks=load.waiting_blocks,
            num_preemptions=load.num_preemptions,
            draining=self._is_draining,
            received=self._received,
        )
        try:
            await self._bus.publish(self._subject, report.encode())
        except BusError as error:
            self._log.debug("load report lost", reason=str(error))
