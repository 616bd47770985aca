"""The plan and the log of transitions in the plan bucket, written by compare-and-set."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from shared.bus.base import KeyValue
from shared.layout import Plan, Transition, TransitionLog
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

    async def append(self, transition: Transition) -> None:
        """Add one to the log of transitions; raises RevisionConflictError like `write`."""
        entry = await self._bucket.get(TRANSITIONS_KEY)
        past: tuple[Transition, ...] = ()
        if entry is not None:
            try:
                past = TransitionLog.decode(entry.value or b"").transitions
            except MessageError as error:
                self._log.error("transitions.unreadable", error=str(error))
        value = TransitionLog(transitions=(*past, transition)[-MAX_TRANSITIONS:]).encode()
        if entry is None:
            await self._bucket.create(TRANSITIONS_KEY, value)
        else:
            await self._bucket.update(TRANSITIONS_KEY, value, entry.revision)
