"""Token frames from the bus to the sessions.

The callback only decodes and enqueues. Tokens that nobody wants mean that a `Cancel` got lost (or
is on its way): it is sent again, but at most once a second for each request.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import structlog

from services.router.generator import Generator
from services.router.link import WorkerLink
from services.router.metrics import RouterMetrics
from services.router.request_state import Verdict
from shared.bus.base import BusMessage
from shared.messages import TokenFrame
from shared.wire import MessageError

_CANCEL_PACE_SECONDS = 1.0
#: A large frame wakes its readers in slices, so that other requests get their turn in between.
_ITEMS_PER_SLICE = 16


@dataclass(frozen=True, slots=True)
class _Stray:
    worker_id: str
    request_id: str
    attempt: int


class TokenInbox:
    """The handler of this router's token subject."""

    def __init__(self, generator: Generator, link: WorkerLink, metrics: RouterMetrics) -> None:
        self._generator = generator
        self._link = link
        self._metrics = metrics
        self._strays: dict[_Stray, None] = {}
        self._cancelled_at: dict[_Stray, float] = {}
        self._log = structlog.get_logger(component="inbox")

    async def on_frame(self, message: BusMessage) -> None:
        """Take a TokenFrame."""
        try:
            frame = TokenFrame.decode(message.payload)
        except MessageError as error:
            self._metrics.malformed.inc()
            self._log.warning("frame.malformed", error=str(error))
            return
        now = time.monotonic()
        for number, item in enumerate(frame.items, start=1):
            verdict = self._generator.deliver(item, frame.worker_id, now)
            if verdict is Verdict.STALE and item.finish_reason is None:
                self._strays[_Stray(frame.worker_id, item.request_id, item.attempt)] = None
            if number % _ITEMS_PER_SLICE == 0:
                await asyncio.sleep(0)

    async def cancel_strays(self, now: float) -> None:
        """Cancel what still runs though nobody wants it; called by the watchdog."""
        recently = {
            stray: at for stray, at in self._cancelled_at.items() if now - at < _CANCEL_PACE_SECONDS
        }
        due = [stray for stray in self._strays if stray not in recently]
        self._strays.clear()
        self._cancelled_at = recently | dict.fromkeys(due, now)
        for stray in due:
            await self._link.cancel(stray.worker_id, stray.request_id, stray.attempt)
