"""A worker without a model that speaks the real protocol on any `Bus`.

Its tokens are a pure function of (seed, position), as a real worker's are, so a replayed request
must bring the very same ones. What it shall do wrong is set in `StubBehaviour`, at any time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from shared.buckets import open_members, open_plan
from shared.bus.base import Bus, BusMessage, Subscription
from shared.layout import GroupPlan, LayoutState, MemberPlan, Plan, Span
from shared.messages import (
    AdminReply,
    Cancel,
    Drain,
    FinishReason,
    GenerateReply,
    GenerateRequest,
    GenerateStatus,
    LoadReport,
    Ping,
    Resume,
    ResumeReply,
    TokenFrame,
    TokenItem,
    TokenLogprobs,
    WorkerInfo,
    WorkerState,
    decode_control,
    unpack_token_ids,
)
from shared.subjects import PLAN_KEY, Subjects, worker_key

BLOCK_SIZE = 16
NUM_LAYERS = 2
LEASE_TTL_SECONDS = 6.0

TokenSource = Callable[[GenerateRequest, int], int]


def hashed_token(low: int, high: int) -> TokenSource:
    """Tokens in [low, high), spread by seed and position."""

    def token(request: GenerateRequest, position: int) -> int:
        return low + (request.sampling.seed * 31 + position * 7919 + 17) % (high - low)

    return token


def scripted_tokens(token_ids: list[int]) -> TokenSource:
    """The given tokens in a circle."""

    def token(request: GenerateRequest, position: int) -> int:
        return token_ids[position % len(token_ids)]

    return token


@dataclass
class StubBehaviour:
    """What the worker does; all faults are off at first."""

    step_seconds: float = 0.002
    kv_blocks_total: int = 1000
    max_model_len: int = 8192
    refuse_with: GenerateStatus | None = None
    refusal: str = ""
    ignores_generate: bool = False  # hangs instead of answering
    answers_after_accepting: bool = True  # False: takes the request but never says so
    ignores_control: bool = False
    reports_load: bool = True
    lose_frames: set[int] = field(default_factory=set)  # output positions whose frame is lost
    duplicate_frames: bool = False
    pause_at: int | None = None  # sends nothing from this position on
    die_at: int | None = None  # is gone, without a word, when a stream gets here
    abort_at: int | None = None
    loses_kv_after: int | None = None  # so many tokens of each attempt
    fail_with: str = ""
    forgets_streams: bool = False  # knows of no stream when asked to resume


@dataclass
class _Stream:
    request: GenerateRequest
    position: int
    is_cancelled: bool = False
    items: list[TokenItem] = field(default_factory=list)


class StubWorker:
    """One worker, leader of its own group."""

    def __init__(
        self,
        bus: Bus,
        worker_id: str,
        tokens: TokenSource,
        behaviour: StubBehaviour | None = None,
        deployment: str = "default",
    ) -> None:
        self.worker_id = worker_id
        self.behaviour = behaviour or StubBehaviour()
        self.requests: list[GenerateRequest] = []
        self.cancelled: list[Cancel] = []
        self.resumed: list[Resume] = []
        self.num_tokens = 0  # generated so far, for all requests
        self.loses_cancels = 0  # so many are noted and not acted on
        self.is_alive = False
        self._bus = bus
        self._subjects = Subjects(deployment)
        self._tokens = tokens
        self._streams: dict[tuple[str, int], _Stream] = {}
        self._received: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscriptions: list[Subscription] = []
        self._incarnation = f"{worker_id}-{time.monotonic_ns()}"

    @property
    def num_running(self) -> int:
        return sum(not stream.is_cancelled for stream in self._streams.values())

    async def start(self) -> None:
        """Join the cluster."""
        self.is_alive = True
        members = await open_members(self._bus, self._subjects, LEASE_TTL_SECONDS)
        await members.put(worker_key(self.worker_id), self._info().encode())
        for subject, handler in (
            (self._subjects.generate(self.worker_id), self._on_generate),
            (self._subjects.control(self.worker_id), self._on_control),
        ):
            self._subscriptions.append(await self._bus.subscribe(subject, handler))
        self._spawn(self._report_forever())

    async def kill(self) -> None:
        """Stop at once: no goodbye, the lease stays until it expires."""
        self.is_alive = False
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()

    async def report(self) -> None:
        """Send a load report."""
        report = LoadReport(
            worker_id=self.worker_id,
            group_id=f"g-{self.worker_id}",
            epoch=1,
            block_size=BLOCK_SIZE,
            kv_blocks_total=self.behaviour.kv_blocks_total,
            kv_blocks_used=min(self.num_running, self.behaviour.kv_blocks_total),
            requests_running=self.num_running,
            requests_waiting=0,
            waiting_blocks=0,
            received=self._received,
        )
        await self._bus.publish(self._subjects.load(self.worker_id), report.encode())

    # --- messages --------------------------------------------------------------------------------

    async def _on_generate(self, message: BusMessage) -> None:
        request = GenerateRequest.decode(message.payload)
        behaviour = self.behaviour
        self.requests.append(request)
        if behaviour.ignores_generate:
            return
        if behaviour.refuse_with is not None:
            reply = GenerateReply(status=behaviour.refuse_with, detail=behaviour.refusal)
            await self._bus.publish(message.reply, reply.encode())
            return
        self._received[request.router_id] = request.dispatch_number
        position = len(unpack_token_ids(request.output_token_ids))
        stream = _Stream(request, position)
        self._streams[request.request_id, request.attempt] = stream
        if behaviour.answers_after_accepting:
            reply = GenerateReply(status=GenerateStatus.ACCEPTED)
            await self._bus.publish(message.reply, reply.encode())
        self._spawn(self._generate(stream))

    async def _on_control(self, message: BusMessage) -> None:
        control = decode_control(message.payload)
        match control:
            case Cancel():
                self.cancelled.append(control)
                if self.loses_cancels:
                    self.loses_cancels -= 1
                    return
                stream = self._streams.get((control.request_id, control.attempt))
                if stream is not None:
                    stream.is_cancelled = True
                return
            case Resume():
                self.resumed.append(control)
                if self.behaviour.ignores_control:
                    return
                await self._resume(message, control)
            case Drain() | Ping():
                if not self.behaviour.ignores_control:
                    await self._bus.publish(message.reply, AdminReply().encode())

    async def _resume(self, message: BusMessage, control: Resume) -> None:
        stream = self._streams.get((control.request_id, control.attempt))
        is_known = stream is not None and not self.behaviour.forgets_streams
        await self._bus.publish(message.reply, ResumeReply(known=is_known).encode())
        if stream is None or not is_known:
            return
        missing = [
            item
            for item in stream.items
            if item.index + len(item.token_ids) > control.num_received or item.finish_reason
        ]
        if missing:
            await self._send(stream, missing)

    # --- generation ------------------------------------------------------------------------------

    async def _generate(self, stream: _Stream) -> None:
        behaviour = self.behaviour
        while not stream.is_cancelled:
            await asyncio.sleep(behaviour.step_seconds)
            position = stream.position
            if behaviour.die_at is not None and position >= behaviour.die_at:
                await self.kill()
                return
            if behaviour.pause_at is not None and position >= behaviour.pause_at:
                continue
            if stream.is_cancelled:
                break
            item = self._next_item(stream)
            stream.items.append(item)
            stream.position += len(item.token_ids)
            self.num_tokens += len(item.token_ids)
            if position not in behaviour.lose_frames:
                await self._send(stream, [item])
                if behaviour.duplicate_frames:
                    await self._send(stream, [item])
            if item.finish_reason is not None:
                stream.is_cancelled = True

    def _next_item(self, stream: _Stream) -> TokenItem:
        request, position, behaviour = stream.request, stream.position, self.behaviour
        common: dict[str, Any] = {
            "request_id": request.request_id,
            "attempt": request.attempt,
            "index": position,
        }
        if behaviour.fail_with:
            return TokenItem(**common, finish_reason=FinishReason.ERROR, error=behaviour.fail_with)
        if behaviour.abort_at is not None and position >= behaviour.abort_at:
            return TokenItem(**common, finish_reason=FinishReason.ABORT)
        num_replayed = len(request.output_token_ids) // 4
        if position - num_replayed == behaviour.loses_kv_after:
            return TokenItem(**{**common, "index": 0}, finish_reason=FinishReason.LOST)
        token_id = self._tokens(request, position)
        reason, stop_token_id = self._ending(request, token_id, position + 1)
        logprobs = None
        if request.sampling.logprobs is not None:
            top = tuple(range(100, 100 + request.sampling.logprobs))
            logprobs = (
                TokenLogprobs(
                    logprob=-0.5,
                    rank=1,
                    top_token_ids=top,
                    top_logprobs=tuple(-1.0 for _ in top),
                ),
            )
        return TokenItem(
            **common,
            token_ids=(token_id,),
            logprobs=logprobs,
            finish_reason=reason,
            stop_token_id=stop_token_id,
        )

    @staticmethod
    def _ending(
        request: GenerateRequest, token_id: int, num_tokens: int
    ) -> tuple[FinishReason | None, int | None]:
        sampling = request.sampling
        if num_tokens > sampling.min_tokens:
            if token_id in request.eos_token_ids and not sampling.ignore_eos:
                return FinishReason.STOP, token_id
            if token_id in sampling.stop_token_ids:
                return FinishReason.STOP, token_id
        return (FinishReason.LENGTH if num_tokens >= sampling.max_tokens else None), None

    async def _send(self, stream: _Stream, items: list[TokenItem]) -> None:
        frame = TokenFrame(
            worker_id=self.worker_id,
            group_id=f"g-{self.worker_id}",
            epoch=1,
            step=stream.position,
            items=tuple(items),
        )
        await self._bus.publish(self._subjects.tokens(stream.request.router_id), frame.encode())

    # --- presence --------------------------------------------------------------------------------

    async def _report_forever(self) -> None:
        while True:
            if self.behaviour.reports_load:
                await self.report()
            await asyncio.sleep(0.05)

    def _info(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.worker_id,
            incarnation=self._incarnation,
            host="stub",
            pid=1,
            state=WorkerState.READY,
            model_id="stub",
            num_layers=NUM_LAYERS,
            max_model_len=self.behaviour.max_model_len,
            device="cpu",
            dtype="float32",
            block_size=BLOCK_SIZE,
            kv_block_bytes=1,
            memory_bytes=4,
            weight_bytes=1,
            kv_bytes=2,
            free_bytes=1,
            layers=(Span(start=0, end=NUM_LAYERS),),
            started_at=0.0,
        )

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def publish_plan(bus: Bus, worker_ids: list[str], deployment: str = "default") -> None:
    """Write the stable layout: each worker a group of its own."""
    plan = Plan(
        term=1,
        epoch=int(time.monotonic() * 1e6),
        state=LayoutState.STABLE,
        model_id="stub",
        num_layers=NUM_LAYERS,
        groups=tuple(
            GroupPlan(
                group_id=f"g-{worker_id}",
                members=(MemberPlan(worker_id=worker_id, span=Span(start=0, end=NUM_LAYERS)),),
            )
            for worker_id in worker_ids
        ),
        created_at=0.0,
    )
    bucket = await open_plan(bus, Subjects(deployment))
    await bucket.put(PLAN_KEY, plan.encode())
