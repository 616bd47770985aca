"""Finding a worker for a request: ask the best group, then the next, else wait and try again.

A request goes straight out while nobody waits; otherwise it lines up (`queue.py`) and the head
tries again whenever the picture of the cluster changes.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from enum import Enum

import structlog

from services.router.dispatch import GroupLoad, blocks_for, rank_groups
from services.router.errors import (
    BadRequestError,
    BodyTooLargeError,
    OverloadedError,
    UnavailableError,
)
from services.router.fleet import Fleet
from services.router.link import WorkerLink
from services.router.metrics import Rejection, RouterMetrics
from services.router.queue import Ticket, WaitingQueue
from services.router.request_state import RequestState
from services.router.session import Session
from shared.bus.base import (
    BusDisconnectedError,
    BusTimeoutError,
    NoRespondersError,
    PayloadTooLargeError,
)
from shared.messages import GenerateReply, GenerateStatus
from shared.wire import MessageError


class _Outcome(Enum):
    """What asking around brought."""

    ACCEPTED = "accepted"
    REFUSED = "refused"  # nobody takes it now


@dataclass(frozen=True)
class DispatchLimits:
    """How long a request may wait."""

    queue_timeout_seconds: float
    no_worker_timeout_seconds: float


class Dispatcher:
    """Places sessions at workers."""

    def __init__(
        self,
        router_id: str,
        fleet: Fleet,
        queue: WaitingQueue,
        link: WorkerLink,
        limits: DispatchLimits,
        metrics: RouterMetrics,
    ) -> None:
        self._router_id = router_id
        self._fleet = fleet
        self._queue = queue
        self._link = link
        self._limits = limits
        self._metrics = metrics
        self._served_at = time.monotonic()  # when a worker was there last
        self._log = structlog.get_logger(component="dispatch")

    def wake(self) -> None:
        """The picture of the cluster changed: whoever waits may try again."""
        self._queue.wake_head()

    def tick(self, now: float) -> None:
        """Time passed; called by the watchdog several times a second."""
        if self._fleet.serving_groups(now):
            self._served_at = now
        self._queue.wake_head()

    async def dispatch(self, session: Session) -> None:
        """Return when a worker has accepted the session's request.

        Raises:
            ApiError: refused for good, or no room in time.
        """
        started_at = time.monotonic()
        try:
            if len(self._queue) == 0 and await self._ask_groups(session) is _Outcome.ACCEPTED:
                return
            ticket = self._queue.enter(session.num_tokens, is_replay=session.is_replay)
            try:
                await self._wait_in_line(session, ticket, started_at)
            finally:
                self._queue.leave(ticket)
        except OverloadedError:
            self._metrics.reject(Rejection.QUEUE_FULL)
            raise
        except UnavailableError:
            self._metrics.reject(Rejection.NO_WORKER)
            raise

    async def _wait_in_line(self, session: Session, ticket: Ticket, started_at: float) -> None:
        while True:
            if self._queue.is_head(ticket):
                ticket.news.clear()
                if await self._ask_groups(session) is _Outcome.ACCEPTED:
                    return
            now = time.monotonic()
            busy_deadline = started_at + self._limits.queue_timeout_seconds
            alone_since = max(started_at, self._served_at)
            alone_deadline = alone_since + self._limits.no_worker_timeout_seconds
            if now >= alone_deadline:
                raise UnavailableError(
                    f"no worker has served this model for {now - alone_since:.0f} s;"
                    " try again later"
                )
            if now >= busy_deadline:
                raise OverloadedError(
                    f"all workers have been busy for {now - started_at:.0f} s; try again later"
                )
            try:
                async with asyncio.timeout(min(busy_deadline, alone_deadline) - now):
                    await ticket.news.wait()
            except TimeoutError:
                continue  # judged above, after one more try

    async def _ask_groups(self, session: Session) -> _Outcome:
        """Ask one group after another, best first; each at most once."""
        asked: set[str] = set()
        too_long = ""
        salt = f"{self._router_id} {session.request.request_id}"
        while candidates := self._fleet.candidates(time.monotonic(), excluded=asked):
            group = rank_groups(candidates, salt)[0]
            asked.add(group.leader)
            reply = await self._ask(session, group)
            if reply is None:
                continue
            match reply.status:
                case GenerateStatus.ACCEPTED:
                    return _Outcome.ACCEPTED
                case GenerateStatus.INVALID:
                    raise BadRequestError(reply.detail)
                case GenerateStatus.TOO_LONG:
                    too_long = reply.detail
        serving = self._fleet.serving_groups(time.monotonic())
        if too_long and all(group.leader in asked for group in serving):
            raise BadRequestError(too_long, param="prompt")
        return _Outcome.REFUSED

    async def _ask(self, session: Session, group: GroupLoad) -> GenerateReply | None:
        """Send the request to one leader; None where it did not answer."""
        leader = group.leader
        load = self._fleet.loads[leader].report
        ledger = self._fleet.ledger(leader)
        number = ledger.book(blocks_for(session.num_tokens, load.block_size))
        session.worker_id = leader
        session.stream.begin_attempt(time.monotonic())
        session.stream.move(RequestState.DISPATCHING)
        epoch = self._fleet.plan.epoch if self._fleet.plan else 0
        try:
            reply = await self._link.generate(session, group.group_id, epoch, number)
        except PayloadTooLargeError as error:
            ledger.cancel(number)
            raise BodyTooLargeError(
                f"a prompt of {len(session.request.prompt_token_ids)} tokens does not fit a message"
                " to a worker",
                param="prompt",
            ) from error
        except (BusTimeoutError, NoRespondersError, BusDisconnectedError, MessageError) as error:
            if not session.stream.pending:
                ledger.cancel(number)
                await self._give_up(session, error)
                return None
            # Tokens of this attempt are as good as the lost answer.
            reply = GenerateReply(status=GenerateStatus.ACCEPTED)
        if reply.status is GenerateStatus.ACCEPTED:
            session.stream.move(RequestState.STREAMING)
            return reply
        ledger.cancel(number)
        session.stream.move(RequestState.QUEUED)
        if reply.status is not GenerateStatus.TOO_LONG:
            self._fleet.mark_full(leader)
        return reply

    async def _give_up(self, session: Session, error: Exception) -> None:
        """The worker may or may not have the request: cancel it there and leave it alone."""
        self._log.warning("dispatch.failed", worker=session.worker_id, error=str(error))
        self._metrics.retries.inc()
        session.stream.move(RequestState.QUEUED)
        self._fleet.mark_suspect(session.worker_id)
        if isinstance(error, BusTimeoutError | MessageError):
            self._fleet.inhibit(session.worker_id, time.monotonic())
        await self._link.cancel(
            session.worker_id, session.request.request_id, session.stream.attempt
        )
