"""Which of several planners leads: one lease, taken and renewed by compare-and-set.

    STANDBY --lease absent, empty or one's own: taken--> LEADING
    LEADING --renewal failed, or not renewed in time --> STANDBY

The term is the second in which the lease was taken, or more where a higher term is known. (A
revision, the usual choice, starts again at 1 when the server loses its store; a router that lived
through that would refuse every plan of a planner and workers that did not.) What keeps a paused
former leader from writing is not this lease but the plan's revision: the new leader rewrites the
plan first, and the old one's compare-and-set fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum

import structlog

from shared.bus.base import BusError, KeyValue, KeyValueEntry, RevisionConflictError
from shared.messages import LeaderLease
from shared.subjects import LEADER_KEY
from shared.wire import MessageError


class Role(StrEnum):
    """What a planner is at the moment."""

    STANDBY = "standby"
    LEADING = "leading"


class LeaderElection:
    """One planner's part in the election. `step` is to be called every third of the TTL.

    Args:
        clock, wall_clock: seconds, monotonic and since 1970; injected for tests.
    """

    def __init__(
        self,
        leader_bucket: KeyValue,
        planner_id: str,
        ttl_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._bucket = leader_bucket
        self._planner_id = planner_id
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._wall_clock = wall_clock
        self._role = Role.STANDBY
        self._term = 0
        self._revision = 0
        self._valid_until = 0.0
        self._log = structlog.get_logger(component="leader", planner=planner_id)

    @property
    def role(self) -> Role:
        """LEADING only while the lease cannot have expired."""
        if self._role is Role.LEADING and self._clock() >= self._valid_until:
            self.step_down("the lease was not renewed in time")
        return self._role

    @property
    def term(self) -> int:
        """The term of the latest lead."""
        return self._term

    def raise_term(self, term: int) -> None:
        """Lead under a higher term from now on, since a higher one than ours was heard of."""
        self._term = max(self._term, term)

    def step_down(self, reason: str) -> None:
        """Lead no more, effective at once."""
        if self._role is Role.LEADING:
            self._log.warning("leader.stepped_down", term=self._term, reason=reason)
        self._role = Role.STANDBY

    async def step(self, known_term: int) -> None:
        """Renew the lease, or take it where nobody holds it.

        Args:
            known_term: the highest term heard of; a new lead gets a higher one.
        """
        try:
            if self.role is Role.LEADING:
                await self._renew()
            else:
                await self._try_to_take(known_term)
        except RevisionConflictError:
            self.step_down("another planner holds the lease")
        except BusError as error:
            self.step_down(f"the lease could not be renewed: {error}")

    async def release(self) -> None:
        """Give the lead up so that another planner need not wait for the lease to expire."""
        if self.role is not Role.LEADING:
            return
        self.step_down("leaving")
        try:
            await self._bucket.update(LEADER_KEY, b"", self._revision)
        except BusError as error:
            self._log.warning("leader.lease_not_released", error=str(error))

    async def _renew(self) -> None:
        started = self._clock()
        self._revision = await self._bucket.update(LEADER_KEY, self._value(), self._revision)
        self._valid_until = started + self._ttl_seconds

    async def _try_to_take(self, known_term: int) -> None:
        entry = await self._bucket.get(LEADER_KEY)
        if entry is not None and self._is_held_by_another(entry):
            return
        started = self._clock()
        self._term = max(self._term + 1, known_term + 1, int(self._wall_clock()))
        if entry is None:
            self._revision = await self._bucket.create(LEADER_KEY, self._value())
        else:
            self._revision = await self._bucket.update(LEADER_KEY, self._value(), entry.revision)
        self._valid_until = started + self._ttl_seconds
        self._role = Role.LEADING
        self._log.info("leader.took_the_lead", term=self._term)

    def _is_held_by_another(self, entry: KeyValueEntry) -> bool:
        if not entry.value:
            return False  # given up, or a marker of its expiry
        try:
            return LeaderLease.decode(entry.value).planner_id != self._planner_id
        except MessageError as error:
            self._log.warning("leader.unreadable_lease", error=str(error))
            return True  # it expires

    def _value(self) -> bytes:
        return LeaderLease(planner_id=self._planner_id, term=self._term).encode()
