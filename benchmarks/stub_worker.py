"""A process of stub workers: the real bus protocol, no model. Started by `benchmarks.router`.

Each worker holds a lease, reports its load, answers requests at once and then sends one frame per
step and router. The plan is written here as well, each worker a group of one, so that no planner
takes part in a measurement of the router.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.command import run_command
from benchmarks.stub_engine import StubEngine, StubVocabulary
from benchmarks.tokenizer import load_tokenizer
from shared.buckets import open_members, open_plan
from shared.bus.base import Bus, BusMessage
from shared.bus.nats import connect
from shared.layout import GroupPlan, LayoutState, MemberPlan, Plan, Span
from shared.messages import (
    AdminReply,
    Cancel,
    Drain,
    GenerateReply,
    GenerateRequest,
    GenerateStatus,
    LoadReport,
    Ping,
    Resume,
    ResumeReply,
    TokenFrame,
    TokenItem,
    WorkerInfo,
    WorkerState,
    decode_control,
)
from shared.subjects import PLAN_KEY, Subjects, worker_key

_NUM_LAYERS = 1
_BLOCK_SIZE = 16
_KV_BLOCKS = 1_000_000
_LEASE_TTL_SECONDS = 6.0
_LOAD_INTERVAL_SECONDS = 0.1


class StubWorker:
    """One worker on the bus."""

    def __init__(
        self, bus: Bus, subjects: Subjects, number: int, model_id: str, vocabulary: StubVocabulary
    ) -> None:
        self.worker_id = f"stub-{number}"
        self.group_id = f"g{number}"
        self.max_lag_seconds = 0.0
        self.num_tokens = 0
        self._bus = bus
        self._subjects = subjects
        self._model_id = model_id
        self._engine = StubEngine(vocabulary)
        self._started_at = time.time()
        self._steps = 0
        self._received: dict[str, int] = {}

    async def run(self, steps_per_second: float) -> None:
        """Serve until cancelled."""
        await self._bus.subscribe(self._subjects.generate(self.worker_id), self._on_generate)
        await self._bus.subscribe(self._subjects.control(self.worker_id), self._on_control)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._renew_lease())
            group.create_task(self._report_load())
            group.create_task(self._step_forever(1 / steps_per_second))

    async def _on_generate(self, message: BusMessage) -> None:
        received_at = time.monotonic()
        request = GenerateRequest.decode(message.payload)
        self._received[request.router_id] = request.dispatch_number
        reply = GenerateReply(status=GenerateStatus.ACCEPTED)
        await self._bus.publish(message.reply, reply.encode())
        item = self._engine.start(request, time.monotonic() - received_at)
        await self._send(request.router_id, [item])

    async def _on_control(self, message: BusMessage) -> None:
        match decode_control(message.payload):
            case Cancel(request_id=request_id):
                self._engine.cancel(request_id)
            case Resume(request_id=request_id, num_received=num_received):
                router_id = self._engine.router_of(request_id)
                item = self._engine.resume(request_id, num_received)
                await self._answer(message, ResumeReply(known=item is not None).encode())
                if router_id is not None and item is not None:
                    await self._send(router_id, [item])
            case Drain():
                await self._answer(message, AdminReply(error="a stub cannot drain").encode())
            case Ping():
                await self._answer(message, b"")

    async def _answer(self, message: BusMessage, payload: bytes) -> None:
        if message.reply:
            await self._bus.publish(message.reply, payload)

    async def _step_forever(self, interval_seconds: float) -> None:
        due_at = time.monotonic()
        while True:
            due_at += interval_seconds
            await asyncio.sleep(max(0.0, due_at - time.monotonic()))
            if self._engine.num_streams:
                self.max_lag_seconds = max(self.max_lag_seconds, time.monotonic() - due_at)
            self._steps += 1
            for router_id, items in self._engine.step().items():
                await self._send(router_id, items)

    async def _send(self, router_id: str, items: list[TokenItem]) -> None:
        self.num_tokens += sum(len(item.token_ids) for item in items)
        frame = TokenFrame(
            worker_id=self.worker_id,
            group_id=self.group_id,
            epoch=1,
            step=self._steps,
            items=tuple(items),
        )
        await self._bus.publish(self._subjects.tokens(router_id), frame.encode())

    async def _renew_lease(self) -> None:
        members = await open_members(self._bus, self._subjects, _LEASE_TTL_SECONDS)
        while True:
            await members.put(worker_key(self.worker_id), self._info().encode())
            await asyncio.sleep(_LEASE_TTL_SECONDS / 3)

    async def _report_load(self) -> None:
        while True:
            await self._bus.publish(self._subjects.load(self.worker_id), self._load().encode())
            await asyncio.sleep(_LOAD_INTERVAL_SECONDS)

    def _info(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.worker_id,
            incarnation=str(os.getpid()),
            host="127.0.0.1",
            pid=os.getpid(),
            state=WorkerState.READY,
            model_id=self._model_id,
            num_layers=_NUM_LAYERS,
            max_model_len=8192,
            device="none",
            dtype="none",
            block_size=_BLOCK_SIZE,
            kv_block_bytes=1,
            memory_bytes=_KV_BLOCKS,
            weight_bytes=0,
            kv_bytes=_KV_BLOCKS,
            free_bytes=0,
            layers=(Span(start=0, end=_NUM_LAYERS),),
            applied_epoch=1,
            started_at=self._started_at,
        )

    def _load(self) -> LoadReport:
        return LoadReport(
            worker_id=self.worker_id,
            group_id=self.group_id,
            epoch=1,
            block_size=_BLOCK_SIZE,
            kv_blocks_total=_KV_BLOCKS,
            kv_blocks_used=self._engine.num_streams,
            requests_running=self._engine.num_streams,
            requests_waiting=0,
            waiting_blocks=0,
            received=dict(self._received),
        )


async def publish_plan(
    bus: Bus, subjects: Subjects, workers: list[StubWorker], model_id: str
) -> None:
    """Write the layout: each worker a group of one."""
    groups = tuple(
        GroupPlan(
            group_id=worker.group_id,
            members=(MemberPlan(worker_id=worker.worker_id, span=Span(start=0, end=_NUM_LAYERS)),),
        )
        for worker in workers
    )
    plan = Plan(
        term=1,
        epoch=1,
        state=LayoutState.STABLE,
        model_id=model_id,
        num_layers=_NUM_LAYERS,
        groups=groups,
        reason="stub workers",
        created_at=time.time(),
    )
    bucket = await open_plan(bus, subjects)
    await bucket.put(PLAN_KEY, plan.encode())


def read_vocabulary(model_dir: Path) -> StubVocabulary:
    """Digits and a few plain words of the model's tokenizer, each one token."""
    tokenizer = load_tokenizer(model_dir)
    digits = tuple(tokenizer.encode(str(digit))[0] for digit in range(10))
    words = tuple(tokenizer.encode(word)[0] for word in (" the", " river", " and", " a", " stone"))
    return StubVocabulary(digits, words)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stub_worker", description=__doc__)
    parser.add_argument("--nats", required=True)
    parser.add_argument("--deployment", required=True)
    parser.add_argument("--model-dir", type=Path, required=True, help="for its tokenizer")
    parser.add_argument("--model-id", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps-per-second", type=float, required=True)
    parser.add_argument("--stats", type=Path, required=True, help="written at the end")
    return parser


async def run(options: argparse.Namespace) -> None:
    bus = await connect(options.nats, service="bench", instance="stub")
    subjects = Subjects(options.deployment)
    vocabulary = read_vocabulary(options.model_dir)
    workers = [
        StubWorker(bus, subjects, number, options.model_id, vocabulary)
        for number in range(options.workers)
    ]
    try:
        await publish_plan(bus, subjects, workers, options.model_id)
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(worker.run(options.steps_per_second))
    finally:
        stats = {
            "tokens": sum(worker.num_tokens for worker in workers),
            "max_step_lag_seconds": max(worker.max_lag_seconds for worker in workers),
        }
        options.stats.write_text(json.dumps(stats))
        await bus.close()


def main() -> int:
    return run_command(run(build_parser().parse_args()))


if __name__ == "__main__":
    sys.exit(main())
