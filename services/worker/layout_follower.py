"""The worker's view of the plan: which group it serves in, at which epoch.

Follows the plan key (a watch is the hint, a periodic read is the truth), ignores what is not newer
than what it has, and acknowledges what it took. The absence of a plan changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from shared.bus.base import BusError, KeyValue
from shared.layout import Plan, PlanPhase
from shared.messages import AckState, PlanAck
from shared.subjects import PLAN_KEY
from shared.wire import MessageError

#: How often the plan is read in case the watch missed a change.
REREAD_SECONDS = 5.0


@dataclass(slots=True)
class Placement:
    """Where the worker stands in the plan it applied last; changed by `LayoutFollower` only."""

    term: int = 0
    epoch: int = 0
    group_id: str = ""


class LayoutFollower:
    """Applies plans to a `Placement` and acknowledges them."""

    def __init__(
        self,
        worker_id: str,
        placement: Placement,
        *,
        plans: KeyValue,
        acks: KeyValue,
        on_change: Callable[[], None],
    ) -> None:
        self._worker_id = worker_id
        self._placement = placement
        self._plans = plans
        self._refused = (0, 0)
        self._acks = acks
        self._on_change = on_change
        self._log = structlog.get_logger(component="layout")

    async def run(self) -> None:
        """Follow the plan for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch(), name="plan watch")
            tasks.create_task(self._reread(), name="plan reread")

    async def _watch(self) -> None:
        async with aclosing(self._plans.watch()) as changes:
            async for entry in changes:
                if entry.key == PLAN_KEY and entry.value is not None:
                    await self.offer(entry.value)

    async def _reread(self) -> None:
        while True:
            try:
                entry = await self._plans.get(PLAN_KEY)
                if entry is not None and entry.value is not None:
                    await self.offer(entry.value)
            except BusError as error:
                self._log.debug("plan not read", reason=str(error))
            await asyncio.sleep(REREAD_SECONDS)

    async def offer(self, payload: bytes) -> None:
        """Take the content of the plan key; stale and foreign plans change nothing."""
        try:
            plan = Plan.decode(payload)
        except MessageError as error:
            self._log.error("the plan cannot be read", reason=str(error))
            return
        applied = (self._placement.term, self._placement.epoch)
        if plan.dry_run or plan.version == applied:
            return
        if plan.version < applied:
            await self._acknowledge(*applied)  # tells its author that there was a newer one
            return
        group = plan.group_of(self._worker_id)
        if plan.phase is PlanPhase.PREPARE or (group is not None and len(group.members) > 1):
            await self._refuse(plan)
            return
        self._placement.term, self._placement.epoch = plan.version
        self._placement.group_id = group.group_id if group else ""
        self._log.info("plan applied", epoch=plan.epoch, group=self._placement.group_id)
        await self._acknowledge(*plan.version)
        self._on_change()

    async def _refuse(self, plan: Plan) -> None:
        """Stay where this worker is: it serves whole models only. The planner falls back."""
        if plan.version == self._refused:
            return
        self._refused = plan.version
        detail = "this worker cannot serve a part of the model"
        self._log.warning("plan refused", epoch=plan.epoch, reason=detail)
        await self._acknowledge(*plan.version, AckState.REFUSED, detail)

    async def _acknowledge(
        self, term: int, epoch: int, state: AckState = AckState.APPLIED, detail: str = ""
    ) -> None:
        ack = PlanAck(worker_id=self._worker_id, term=term, epoch=epoch, state=state, detail=detail)
        try:
            await self._acks.put(self._worker_id, ack.encode())
        except BusError as error:
            self._log.warning("acknowledgement lost", epoch=epoch, reason=str(error))
