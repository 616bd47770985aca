"""Looks at every stream and every worker several times a second, so that no wait is unbounded.

reports of a worker stopped, or it did not answer  ->  ping: nobody there -> replay its streams
no token for a while                               ->  have the stream ask for what is missing
a client does not read                             ->  close its connection
no connection to the bus for long                  ->  fail the streams
"""

from __future__ import annotations

import asyncio
import time

import structlog

from services.router.dispatcher import Dispatcher
from services.router.errors import UnavailableError
from services.router.fleet import Fleet
from services.router.generator import Generator
from services.router.link import Reach, WorkerLink
from services.router.token_inbox import TokenInbox
from shared.bus.base import Bus

TICK_SECONDS = 0.1
#: A stream whose worker's reports stopped asks after so long without tokens ...
SUSPECT_SILENCE_SECONDS = 2.0
#: ... and any other after so long: it may be waiting for a seat, but a lost frame looks the same.
SILENCE_SECONDS = 5.0
#: A worker without reports that does not even answer a ping is given up after so long, and at once
#: where the plan has no place for it: its group broke because others miss it, too.
GIVE_UP_SECONDS = 5.0
#: After a reconnect the workers get so long to reconnect, too.
RECONNECT_GRACE_SECONDS = 3.0


class Watchdog:
    """One task; started by `service.py`."""

    def __init__(
        self,
        bus: Bus,
        fleet: Fleet,
        dispatcher: Dispatcher,
        generator: Generator,
        inbox: TokenInbox,
        link: WorkerLink,
        *,
        slow_client_timeout_seconds: float,
        disconnected_timeout_seconds: float,
    ) -> None:
        self._bus = bus
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._generator = generator
        self._inbox = inbox
        self._link = link
        self._slow_client_timeout_seconds = slow_client_timeout_seconds
        self._disconnected_timeout_seconds = disconnected_timeout_seconds
        self._connected_at = time.monotonic()  # last seen connected
        self._reconnected_at = float("-inf")
        self._pinged: set[str] = set()
        self._log = structlog.get_logger(component="watchdog")

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as pings:
            while True:
                await asyncio.sleep(TICK_SECONDS)
                now = time.monotonic()
                self._dispatcher.tick(now)
                self._watch_clients(now)
                if not self._bus.is_connected:
                    self._watch_outage(now)
                    continue
                self._connected_at = now
                self._watch_streams(now)
                for worker_id in self._suspects(now):
                    self._pinged.add(worker_id)
                    pings.create_task(self._ping(worker_id), name=f"ping {worker_id}")
                await self._inbox.cancel_strays(now)

    async def on_reconnect(self) -> None:
        """The connection is back: frames may be lost, so every stream asks for the rest."""
        now = time.monotonic()
        self._connected_at = self._reconnected_at = now
        for session in self._generator.streaming():
            session.ask_again(now)

    def _watch_streams(self, now: float) -> None:
        for session in self._generator.streaming():
            is_suspect = self._fleet.is_suspect(session.worker_id, now)
            patience = SUSPECT_SILENCE_SECONDS if is_suspect else SILENCE_SECONDS
            is_silent = now - max(session.stream.last_heard_at, session.resumed_at) > patience
            if is_silent or session.stream.has_gap:
                session.ask_again(now)

    def _watch_clients(self, now: float) -> None:
        for session in self._generator.sessions():
            since = session.writing_since
            if since is None or now - since <= self._slow_client_timeout_seconds:
                continue
            if session.on_stalled is not None:
                self._log.warning("client.stalled", unread=len(session.stream.pending))
                session.on_stalled()
                session.on_stalled = None

    def _watch_outage(self, now: float) -> None:
        seconds = now - self._connected_at
        if seconds > self._disconnected_timeout_seconds:
            for session in self._generator.streaming():
                session.fail(UnavailableError(f"no connection to the workers for {seconds:.0f} s"))

    def _suspects(self, now: float) -> list[str]:
        """Workers with streams of ours that may be dead and are not being asked already."""
        busy = {session.worker_id for session in self._generator.streaming()}
        return [
            worker_id
            for worker_id in sorted(busy - self._pinged)
            if self._fleet.is_suspect(worker_id, now)
        ]

    async def _ping(self, worker_id: str) -> None:
        try:
            reach = await self._link.ping(worker_id)
        finally:
            self._pinged.discard(worker_id)
        now = time.monotonic()
        if now - self._reconnected_at < RECONNECT_GRACE_SECONDS:
            return
        age = self._fleet.load_age(worker_id, now)
        is_hopeless = age > GIVE_UP_SECONDS or not self._fleet.is_placed(worker_id)
        if reach is Reach.GONE:
            self._generator.lose_worker(worker_id, "nobody listens there")
        elif reach is Reach.SILENT and is_hopeless:
            self._generator.lose_worker(worker_id, f"silent for {age:.1f} s")
