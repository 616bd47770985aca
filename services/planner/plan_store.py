"""The plan and the log of transitions in the plan bucket, written by compare-and-set."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from shared.bus.base import KeyValue
from shared.layout import DecisionNote, Plan, Transition, TransitionLog
from shared.subjects import PLAN_KEY, TRANSITIONS_KEY
from shared.wire import MessageError

MAX_TRANSITIONS = 20


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """What the plan key holds: None where it is empty or cannot be read."""

    plan: Plan | None
    revision: int


class PlanStore:
    """Reads and writes the plan bucket. Every method raises BusError."""

    def __init__(self, bucket: KeyValue) -> None:
        self._bucket = bucket
        self._log = structlog.get_logger(component="plan_store")

    async def read(self) -> StoredPlan:
        """The plan as it is now."""
        entry = await self._bucket.get(PLAN_KEY)
        if entry is None:
            return StoredPlan(None, 0)
        try:
            return StoredPlan(Plan.decode(entry.value or b""), entry.revision)
        except MessageError as error:
            self._log.error("plan.unreadable", revision=entry.revision, error=str(error))
            return StoredPlan(None, entry.revision)

    async def write(self, plan: Plan, revision: int) -> int:
        """Replace the plan read at `revision` (0: there was none); returns the new revision.

        Raises RevisionConflictError where somebody else wrote it meanwhile.
        """
        if revision == 0:
            return await self._bucket.create(PLAN_KEY, plan.encode())
        return await self._bucket.update(PLAN_KEY, plan.encode(), revision)

    async def record(self, transition: Transition | None, note: DecisionNote | None) -> None:
        """Add to the log of transitions; raises RevisionConflictError like `write`.

        Args:
            transition: one that ended.
            note: the latest decision; None leaves the one that is there.
        """
        entry = await self._bucket.get(TRANSITIONS_KEY)
        log = TransitionLog()
        if entry is not None:
            try:
                log = TransitionLog.decode(entry.value or b"")
            except MessageError as error:
                self._log.error("transitions.unreadable", error=str(error))
        ended = (transition,) if transition is not None else ()
        value = TransitionLog(
            transitions=(*log.transitions, *ended)[-MAX_TRANSITIONS:],
            decision=note or log.decision,
        ).encode()
        if entry is None:
            await self._bucket.create(TRANSITIONS_KEY, value)
        else:
            await self._bucket.update(TRANSITIONS_KEY, value, entry.revision)
