"""Operators' wishes, passed on by a router and answered by the leading planner.

A drained worker shows so in its lease, and for that leaves the plan: a planner that takes the lead
later knows of it too. Drops and restores are decided in the planner's own turn, like everything
that changes the plan.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import structlog

from shared.bus.base import Bus, BusError, BusMessage, NoRespondersError, Subscription
from shared.messages import AdminAction, AdminReply, AdminRequest, Drain, WorkerInfo
from shared.subjects import Subjects
from shared.wire import MessageError

WORKER_TIMEOUT_SECONDS = 2.0
MAX_WAITING = 64


class AdminDesk:
    """Takes AdminRequests while this planner leads, one after another.

    Args:
        workers: the living workers by id.
        change_layout: carries out a drop or a restore, within a time of its own.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        workers: Callable[[], Mapping[str, WorkerInfo]],
        change_layout: Callable[[AdminRequest], Awaitable[AdminReply]],
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._workers = workers
        self._change_layout = change_layout
        self._subscription: Subscription | None = None
        self._waiting: asyncio.Queue[BusMessage] = asyncio.Queue(MAX_WAITING)
        self._log = structlog.get_logger(component="admin")

    async def open(self) -> None:
        """Listen: this planner leads now. Idempotent."""
        if self._subscription is None:
            self._subscription = await self._bus.subscribe(self._subjects.admin, self._enqueue)

    async def close(self) -> None:
        """Listen no more. Idempotent."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()

    async def run(self) -> None:
        """Answer what was asked, for ever."""
        while True:
            message = await self._waiting.get()
            try:
                reply = await self._handle(AdminRequest.decode(message.payload))
            except MessageError as error:
                reply = AdminReply(error=str(error))
            await self._answer(message, reply)

    async def _enqueue(self, message: BusMessage) -> None:
        if self._waiting.full():
            await self._answer(message, AdminReply(error="too many admin requests at once"))
        else:
            self._waiting.put_nowait(message)

    async def _answer(self, message: BusMessage, reply: AdminReply) -> None:
        if not message.reply:
            return
        try:
            await self._bus.publish(message.reply, reply.encode())
        except BusError as error:
            self._log.warning("admin.reply_lost", error=str(error))

    async def _handle(self, request: AdminRequest) -> AdminReply:
        match request.action:
            case AdminAction.DRAIN:
                return await self._drain(request.workers)
            case AdminAction.DROP | AdminAction.RESTORE:
                return await self._change_layout(request)

    async def _drain(self, worker_ids: tuple[str, ...]) -> AdminReply:
        if not worker_ids:
            return AdminReply(error="name the worker to drain")
        living = self._workers()
        if unknown := [worker_id for worker_id in worker_ids if worker_id not in living]:
            return AdminReply(error=f"there is no worker {', '.join(unknown)}")
        for worker_id in worker_ids:
            if error := await self._drain_one(worker_id):
                return AdminReply(error=error)
        self._log.info("admin.drained", workers=list(worker_ids))
        return AdminReply(detail=f"{', '.join(worker_ids)}: takes no new requests")

    async def _drain_one(self, worker_id: str) -> str:
        """Ask one worker to drain; returns what went wrong, or ""."""
        try:
            answer = AdminReply.decode(
                await self._bus.request(
                    self._subjects.control(worker_id),
                    Drain().encode(),
                    timeout_seconds=WORKER_TIMEOUT_SECONDS,
                )
            )
        except NoRespondersError:
            return f"worker {worker_id} is gone"
        except (BusError, MessageError) as error:
            return f"worker {worker_id} did not answer: {error}"
        if answer.error:
            return f"worker {worker_id} refuses: {answer.error}"
        return ""
