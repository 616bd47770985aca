"""Who is there: leases in the members bucket, and a view of them.

A process keeps a `Lease`; whoever wants to know the others keeps a `MemberView`. A member whose
lease is deleted or not renewed for the bucket's TTL has left.

Absence counts only where it can be trusted. While the bus is down, and for one TTL after it came
back or after the server lost its store, leases may be missing although their owners live; the
view is then *held*: members may join and change but none leaves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing

import structlog

from shared.bus.base import Bus, BusError, KeyValue, KeyValueEntry
from shared.member_table import (
    MemberEvent,
    MemberEventKind,
    MemberInfo,
    MemberTable,
    decode_member,
)
from shared.messages import PlannerInfo, RouterInfo, WorkerInfo
from shared.wire import MessageError

__all__ = ["Lease", "MemberEvent", "MemberEventKind", "MemberInfo", "MemberView"]

REFRESH_SECONDS = 2.0
RETRY_SECONDS = 0.5
RENEWALS_PER_TTL = 3

Clock = Callable[[], float]

# --- one's own lease -----------------------------------------------------------------------------


class Lease:
    """Keeps one key of the members bucket alive.

    The owner runs `run()` as one of its tasks and calls `release()` when it leaves.
    """

    def __init__(
        self, bus: Bus, members: KeyValue, key: str, info: MemberInfo, ttl_seconds: float
    ) -> None:
        self._members = members
        self._key = key
        self._info = info
        self._renew_seconds = ttl_seconds / RENEWALS_PER_TTL
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()
        self._released = False
        self._failing = False
        self._log = structlog.get_logger(component="lease", key=key)
        bus.on_reconnect(self._on_reconnect)

    def update(self, info: MemberInfo) -> None:
        """Show `info` from now on; written at once by `run`."""
        self._info = info
        self._wake.set()

    async def run(self) -> None:
        """Renew the lease for ever, more often than needed; an outage of the bus is waited out."""
        while True:
            self._wake.clear()
            pause = self._renew_seconds if await self._renew() else RETRY_SECONDS
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def release(self) -> None:
        """Leave: nobody has to wait for the lease to expire. Idempotent."""
        async with self._writing:
            if self._released:
                return
            self._released = True
            try:
                await self._members.delete(self._key)
            except BusError as error:
                self._log.warning("lease.not_deleted", error=str(error))

    async def _renew(self) -> bool:
        async with self._writing:
            if self._released:
                return True
            try:
                await self._members.put(self._key, self._info.encode())
            except BusError as error:
                if not self._failing:
                    self._log.warning("lease.not_renewed", error=str(error))
                self._failing = True
                return False
        self._failing = False
        return True

    async def _on_reconnect(self) -> None:
        self._wake.set()


# --- the view of all leases ----------------------------------------------------------------------


class MemberView:
    """The members of a deployment, kept up to date.

    The owner runs `run()` as one of its tasks. Subscribers are called on the event loop, must not
    block, and see `workers`, `routers` and `planners` as they are after the change.

    Args:
        clock: seconds; injected for tests.
    """

    def __init__(
        self,
        bus: Bus,
        members: KeyValue,
        ttl_seconds: float,
        clock: Clock = time.monotonic,
        refresh_seconds: float = REFRESH_SECONDS,
    ) -> None:
        self._bus = bus
        self._members = members
        self._clock = clock
        self._refresh_seconds = refresh_seconds
        self._table = MemberTable(ttl_seconds)
        self._subscribers: list[Callable[[MemberEvent], None]] = []
        self._refresh = asyncio.Event()
        self._primed = asyncio.Event()
        self._unreadable: set[str] = set()
        self._disconnects_seen = bus.stats.disconnects
        self._log = structlog.get_logger(component="members")
        bus.on_reconnect(self._on_reconnect)

    @property
    def workers(self) -> dict[str, WorkerInfo]:
        """Workers by id."""
        infos = self._table.members.values()
        return {info.worker_id: info for info in infos if isinstance(info, WorkerInfo)}

    @property
    def routers(self) -> dict[str, RouterInfo]:
        """Routers by id."""
        infos = self._table.members.values()
        return {info.router_id: info for info in infos if isinstance(info, RouterInfo)}

    @property
    def planners(self) -> dict[str, PlannerInfo]:
        """Planners by id."""
        infos = self._table.members.values()
        return {info.planner_id: info for info in infos if isinstance(info, PlannerInfo)}

    @property
    def is_held(self) -> bool:
        """True while nobody is taken to have left: the bus is down or was a moment ago."""
        outage = not self._bus.is_connected or self._disconnects_seen != self._bus.stats.disconnects
        return outage or self._table.is_held(self._clock())

    def subscribe(self, subscriber: Callable[[MemberEvent], None]) -> None:
        """Call `subscriber` for every change from now on."""
        self._subscribers.append(subscriber)

    async def wait_primed(self) -> None:
        """Return when the bucket was read once."""
        await self._primed.wait()

    async def run(self) -> None:
        """Follow the bucket for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow(), name="members watch")
            tasks.create_task(self._read_periodically(), name="members refresh")

    async def _follow(self) -> None:
        async with aclosing(self._members.watch()) as changes:
            async for entry in changes:
                if entry.value is None:
                    self._refresh.set()  # whether that means "left" is for a whole reading to say
                    continue
                info = self._decode(entry)
                if info is not None:
                    self._tell(self._table.put(entry.key, info, entry.revision))

    async def _read_periodically(self) -> None:
        while True:
            self._refresh.clear()
            try:
                await self._read()
            except BusError as error:
                self._log.debug("members.not_read", error=str(error))
            try:
                async with asyncio.timeout(self._refresh_seconds):
                    await self._refresh.wait()
            except TimeoutError:
                continue

    async def _read(self) -> None:
        disconnects = self._bus.stats.disconnects
        entries = await self._members.entries()
        if disconnects != self._bus.stats.disconnects:
            return  # the reading straddles an outage
        if disconnects != self._disconnects_seen:
            self._disconnects_seen = disconnects
            self._table.hold(self._clock())
        present: dict[str, tuple[MemberInfo, int]] = {}
        for entry in entries.values():
            info = self._decode(entry)
            if info is not None:
                present[entry.key] = (info, entry.revision)
        unreadable = entries.keys() - present.keys()
        self._tell(self._table.replace(present, unreadable, self._clock()))
        self._primed.set()

    def _decode(self, entry: KeyValueEntry) -> MemberInfo | None:
        try:
            info = decode_member(entry)
        except MessageError as error:
            if entry.key not in self._unreadable:
                self._log.warning("members.unreadable", key=entry.key, error=str(error))
            self._unreadable.add(entry.key)
            return None
        self._unreadable.discard(entry.key)
        return info

    def _tell(self, events: list[MemberEvent]) -> None:
        for event in events:
            if event.kind is not MemberEventKind.CHANGED:
                self._log.debug("members.event", kind=event.kind.value, key=event.key)
            for subscriber in self._subscribers:
                subscriber(event)

    async def _on_reconnect(self) -> None:
        self._refresh.set()
