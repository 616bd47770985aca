"""What the worker does with messages that are addressed to it: requests and control.

Handlers run on the event loop and only decode, decide and enqueue.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import assert_never

import structlog

from services.worker.admission import AdmissionLimits, admit
from services.worker.engine.request import Request
from services.worker.engine_thread import Add, Cancel, EngineThread
from services.worker.member_state import Placement
from services.worker.outbound import TokenPublisher
from services.worker.streams import StreamTable
from shared import messages
from shared.bus.base import Bus, BusMessage
from shared.messages import (
    AdminReply,
    FinishReason,
    GenerateReply,
    GenerateRequest,
    GenerateStatus,
    ResumeReply,
    TokenItem,
    decode_control,
    unpack_token_ids,
)
from shared.subjects import Subjects
from shared.wire import Message, MessageError


class Intake:
    """Takes requests, cancellations, resumptions and the order to drain."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        engine: EngineThread,
        streams: StreamTable,
        publisher: TokenPublisher,
        placement: Placement,
        limits: AdmissionLimits,
        on_drain: Callable[[], None],
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._engine = engine
        self._streams = streams
        self._publisher = publisher
        self._placement = placement
        self._limits = limits
        self._on_drain = on_drain
        self._dispatches: deque[tuple[str, int]] = deque()  # not yet in the engine's load
        self._num_dispatches_included = 0
        self._received: dict[str, int] = {}
        self.is_draining = False
        self._log = structlog.get_logger(component="intake")

    def received(self, num_added: int) -> dict[str, int]:
        """Per router, the dispatch number of the last request among the engine's first `num_added`.

        Called with the count of each engine report, which only rises.
        """
        while self._num_dispatches_included < num_added:
            router_id, number = self._dispatches.popleft()
            self._received[router_id] = max(number, self._received.get(router_id, 0))
            self._num_dispatches_included += 1
        return dict(self._received)

    # --- requests --------------------------------------------------------------------------------

    async def on_generate(self, message: BusMessage) -> None:
        """Decide about a GenerateRequest, answer it, and hand it to the engine."""
        try:
            request = GenerateRequest.decode(message.payload)
            reply = self._take(request)
        except MessageError as error:
            reply = GenerateReply(status=GenerateStatus.INVALID, detail=str(error))
        await self._answer(message, reply)

    def _take(self, request: GenerateRequest) -> GenerateReply:
        placement = self._placement
        if request.group_id != placement.group_id or not placement.is_leader:
            return GenerateReply(
                status=GenerateStatus.STALE_EPOCH,
                detail=f"the worker serves in group {placement.group_id!r}",
            )
        prompt = unpack_token_ids(request.prompt_token_ids)
        output = unpack_token_ids(request.output_token_ids)
        reply = admit(
            self._limits, prompt + output, self._streams.num_open, is_draining=self.is_draining
        )
        if reply.status is GenerateStatus.ACCEPTED:
            self._start(request, prompt, output)
        return reply

    def _start(self, request: GenerateRequest, prompt: list[int], output: list[int]) -> None:
        self._streams.open(request.request_id, request.attempt, request.router_id)
        self._dispatches.append((request.router_id, request.dispatch_number))
        self._engine.submit(
            Add(
                Request(
                    request_id=request.request_id,
                    router_id=request.router_id,
                    attempt=request.attempt,
                    prompt_token_ids=prompt,
                    output_token_ids=output,
                    sampling=request.sampling,
                    eos_token_ids=frozenset(request.eos_token_ids),
                    arrival_seconds=time.monotonic(),
                )
            )
        )

    # --- control ---------------------------------------------------------------------------------

    async def on_control(self, message: BusMessage) -> None:
        """Act on a control message."""
        try:
            control = decode_control(message.payload)
        except MessageError as error:
            self._log.warning("control message ignored", reason=str(error))
            return
        match control:
            case messages.Cancel() | messages.Resume() if self._has_moved(control):
                await self._pass_on(message, control)
            case messages.Cancel(request_id=request_id, attempt=attempt):
                self.cancel(request_id, attempt)
            case messages.Resume():
                await self._resume(message, control)
            case messages.Drain():
                self._on_drain()
                await self._answer(message, AdminReply(detail="draining"))
            case messages.Ping():
                await self._answer(message, AdminReply())
            case _:
                assert_never(control)

    def _has_moved(self, control: messages.Cancel | messages.Resume) -> bool:
        return bool(self._streams.moved_to(control.request_id, control.attempt))

    async def _pass_on(
        self, message: BusMessage, control: messages.Cancel | messages.Resume
    ) -> None:
        """Let the worker that serves the stream now act, and answer."""
        worker_id = self._streams.moved_to(control.request_id, control.attempt)
        subject = self._subjects.control(worker_id)
        await self._bus.publish(subject, message.payload, reply=message.reply)

    def cancel(self, request_id: str, attempt: int) -> None:
        """Free what an open stream holds and close it. Idempotent."""
        if not self._streams.is_open(request_id, attempt):
            return
        self._engine.submit(Cancel(request_id, attempt))
        closing = TokenItem(
            request_id=request_id, attempt=attempt, index=0, finish_reason=FinishReason.ABORT
        )
        self._streams.record([closing], time.monotonic())

    def cancel_router(self, router_id: str) -> None:
        """Drop everything that runs for a router that is gone."""
        streams = self._streams.open_streams_of(router_id)
        if streams:
            self._log.warning("router is gone", router=router_id, requests=len(streams))
        for stream in streams:
            self.cancel(stream.request_id, stream.attempt)

    async def _resume(self, message: BusMessage, resume: messages.Resume) -> None:
        """Say whether the stream is known, then send again what the router misses."""
        items = self._streams.items_since(resume.request_id, resume.attempt, resume.num_received)
        await self._answer(message, ResumeReply(known=items is not None))
        router_id = self._streams.router_of(resume.request_id)
        if items and router_id is not None:
            await self._publisher.send({router_id: items})

    async def _answer(self, message: BusMessage, reply: Message) -> None:
        if message.reply:
            await self._bus.publish(message.reply, reply.encode())
