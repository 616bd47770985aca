"""The worker's view of the plan, and what it says to it.

Follows the plan key (a watch is the hint, a periodic read is the truth), ignores what is not newer
than what it has, hands the rest to the `Transition` and acknowledges as far as that has come. The
absence of a plan changes nothing.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import structlog

from services.worker.member_state import Answer, Placement
from services.worker.transition import Transition
from shared.bus.base import BusError, KeyValue
from shared.layout import Plan
from shared.messages import PlanAck
from shared.subjects import PLAN_KEY
from shared.wire import MessageError

#: How often the plan is read in case the watch missed a change.
REREAD_SECONDS = 5.0
#: Time until an answer that could not be said is said again.
_RETRY_SECONDS = 0.5


class LayoutFollower:
    """Takes plans from the bus and brings answers there."""

    def __init__(
        self,
        worker_id: str,
        placement: Placement,
        transition: Transition,
        *,
        plans: KeyValue,
        acks: KeyValue,
    ) -> None:
        self._worker_id = worker_id
        self._placement = placement
        self._transition = transition
        self._plans = plans
        self._acks = acks
        self._answer_is_due = asyncio.Event()
        self._log = structlog.get_logger(component="layout")

    async def run(self) -> None:
        """Follow the plan for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch(), name="plan watch")
            tasks.create_task(self._reread(), name="plan reread")
            tasks.create_task(self._acknowledge(), name="plan acks")

    def wake(self) -> None:
        """The transition's answer changed, or must be said again: say it soon."""
        self._answer_is_due.set()

    async def _watch(self) -> None:
        async with aclosing(self._plans.watch()) as changes:
            async for entry in changes:
                if entry.key == PLAN_KEY and entry.value is not None:
                    self.offer(entry.value)

    async def _reread(self) -> None:
        while True:
            try:
                entry = await self._plans.get(PLAN_KEY)
                if entry is not None and entry.value is not None:
                    self.offer(entry.value)
            except BusError as error:
                self._log.debug("plan not read", reason=str(error))
            await asyncio.sleep(REREAD_SECONDS)

    def offer(self, payload: bytes) -> None:
        """Take the content of the plan key; stale and foreign plans change nothing."""
        try:
            plan = Plan.decode(payload)
        except MessageError as error:
            self._log.error("the plan cannot be read", reason=str(error))
            return
        taken = (self._placement.term, self._placement.epoch)
        if plan.dry_run or plan.version == taken:
            return
        if plan.version < taken:
            self.wake()  # tells its author that there was a newer one
            return
        self._transition.take(plan)
        self._log.info(
            "plan taken", epoch=plan.epoch, phase=plan.phase.value, group=self._placement.group_id
        )

    async def _acknowledge(self) -> None:
        """Publish the newest answer whenever it changed, until it is known to be there."""
        while True:
            await self._answer_is_due.wait()
            self._answer_is_due.clear()
            answer = self._transition.answer
            if answer is not None and not await self._publish(answer):
                self._answer_is_due.set()
                await asyncio.sleep(_RETRY_SECONDS)

    async def _publish(self, answer: Answer) -> bool:
        ack = PlanAck(
            worker_id=self._worker_id,
            term=answer.term,
            epoch=answer.epoch,
            state=answer.state,
            detail=answer.detail,
        )
        try:
            await self._acks.put(self._worker_id, ack.encode())
        except BusError as error:
            self._log.warning("acknowledgement lost", epoch=answer.epoch, reason=str(error))
            return False
        return True
