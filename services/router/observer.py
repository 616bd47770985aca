"""Keeps the fleet's picture true: follows plan and members, listens to load reports.

`KeyValue.watch` and `MemberView` read their buckets again by themselves from time to time, so a
missed change shows up here at last.
"""

from __future__ import annotations

import time
from contextlib import aclosing

import structlog

from services.router.dispatcher import Dispatcher
from services.router.fleet import Fleet
from services.router.generator import Generator
from services.router.metrics import RouterMetrics
from shared.bus.base import BusMessage, KeyValue
from shared.layout import Plan, TransitionLog
from shared.membership import MemberEvent, MemberEventKind
from shared.messages import LoadReport, WorkerInfo
from shared.subjects import PLAN_KEY, TRANSITIONS_KEY
from shared.wire import MessageError


class Observer:
    """Turns what the bus says into the fleet's picture."""

    def __init__(
        self, fleet: Fleet, dispatcher: Dispatcher, generator: Generator, metrics: RouterMetrics
    ) -> None:
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._generator = generator
        self._metrics = metrics
        self._log = structlog.get_logger(component="observer")

    async def on_load(self, message: BusMessage) -> None:
        """Take a LoadReport."""
        try:
            report = LoadReport.decode(message.payload)
        except MessageError as error:
            self._note_malformed(error)
            return
        self._fleet.apply_load(report, time.monotonic())
        self._dispatcher.wake()

    def on_member(self, event: MemberEvent) -> None:
        """Take a change of the membership."""
        info = event.info
        if not isinstance(info, WorkerInfo):
            return
        if event.kind is MemberEventKind.LEFT:
            self._fleet.remove_worker(info.worker_id)
            self._generator.lose_worker(info.worker_id, "its lease is gone")
            return
        self._fleet.apply_worker(info)
        if event.kind is MemberEventKind.RESTARTED:
            self._generator.lose_worker(info.worker_id, "it was restarted")
        self._dispatcher.wake()

    async def watch_plan(self, bucket: KeyValue) -> None:
        """Follow the plan bucket until cancelled."""
        async with aclosing(bucket.watch()) as entries:
            async for entry in entries:
                # Absence of a plan changes nothing: the last one stays in force.
                if entry.value is not None:
                    self._take_plan(entry.key, entry.value)

    def _take_plan(self, key: str, value: bytes) -> None:
        try:
            if key == PLAN_KEY:
                plan = Plan.decode(value)
                if self._fleet.apply_plan(plan):
                    self._log.info(
                        "plan.applied", term=plan.term, epoch=plan.epoch, state=plan.state.value
                    )
                    self._dispatcher.wake()
            elif key == TRANSITIONS_KEY:
                self._fleet.transitions = TransitionLog.decode(value)
        except MessageError as error:
            self._note_malformed(error)

    def _note_malformed(self, error: MessageError) -> None:
        self._metrics.malformed.inc()
        self._log.warning("message.malformed", error=str(error))
