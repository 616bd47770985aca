"""Two real workers, and their planner and router in one: what the drop benchmark acts through.

this process --plans, requests--> NATS <--acks, tokens-- worker-a, worker-b   one core each
             <--GET /metrics: time and bytes of each phase--
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import ManagedProcess, ServerError, free_port
from shared.buckets import open_acks, open_plan
from shared.bus.base import Bus, BusMessage, KeyValue
from shared.bus.nats import connect
from shared.embedded_nats import EmbeddedNats
from shared.layout import Change, GroupPlan, LayoutState, MemberPlan, Plan, PlanPhase, Span
from shared.messages import (
    AckState,
    Cancel,
    FinishReason,
    GenerateReply,
    GenerateRequest,
    GenerateStatus,
    PlanAck,
    TokenFrame,
    pack_token_ids,
)
from shared.sampling import SamplingParams
from shared.subjects import PLAN_KEY, Subjects

WORKERS = ("worker-a", "worker-b")
NUM_LAYERS = 30  # of SmolLM2
_CUT = 16  # as planners cut it: the other stage has the head
_VOCAB_SIZE = 49152
_ROUTER = "bench"
_SUBJECTS = Subjects("default")
_DEADLINE_SECONDS = 60.0
_POLL_SECONDS = 0.005

#: Values by metric and labels, as `sum` of all samples of that name on a worker.
Metrics = dict[str, float]


class DropCluster:
    """Writes plans, sends requests, keeps the time of every token."""

    def __init__(self, bus: Bus, ports: Sequence[int]) -> None:
        self._bus = bus
        self._ports = dict(zip(WORKERS, ports, strict=True))
        self._random = random.Random(1)
        self._plan: Plan | None = None
        self._num_requests = 0
        self._failure = ""
        self._acks: dict[str, PlanAck] = {}  # the latest of each worker
        self.token_times: dict[str, list[float]] = defaultdict(list)

    async def start(self) -> None:
        """Listen for tokens and make two replicas of the workers."""
        await self._bus.subscribe(_SUBJECTS.tokens(_ROUTER), self._on_frame)
        self._plans = await open_plan(self._bus, _SUBJECTS)
        self._listening = asyncio.create_task(self._listen(await open_acks(self._bus, _SUBJECTS)))
        await self._publish(self._replicas, LayoutState.STABLE, PlanPhase.COMMIT)
        await self._all_said(AckState.SETTLED)

    async def close(self) -> None:
        """Listen no more."""
        self._listening.cancel()
        await asyncio.wait([self._listening])

    async def _listen(self, acks: KeyValue) -> None:
        """Note what the workers say; asking them again and again would disturb what is measured."""
        async with contextlib.aclosing(acks.watch()) as entries:
            async for entry in entries:
                if entry.value:
                    self._acks[entry.key] = PlanAck.decode(entry.value)

    # --- layouts ---------------------------------------------------------------------------------

    async def drop(self) -> float:
        """Make one pipeline of the workers; returns when it was committed, monotonic."""
        group = GroupPlan(group_id="pipeline", epoch=self._next_epoch, members=self._halves)
        return await self._change((group,), LayoutState.DROPPING)

    async def prepare_restore(self) -> None:
        """Return when both workers hold every layer again."""
        await self._publish(self._replicas, LayoutState.RESTORING, PlanPhase.PREPARE)
        await self._all_said(AckState.PREPARED)

    async def commit_restore(self) -> None:
        """Return when the workers serve alone; requests may still be on the pipeline."""
        await self._publish(self._replicas, LayoutState.RESTORING, PlanPhase.COMMIT)
        await self._all_said(AckState.APPLIED, AckState.SETTLED)

    async def settled(self) -> None:
        """Return when no request is left on the layout before."""
        await self._all_said(AckState.SETTLED)

    @property
    def _replicas(self) -> tuple[GroupPlan, ...]:
        whole = Span(start=0, end=NUM_LAYERS)
        return tuple(
            GroupPlan(
                group_id=f"g-{worker}",
                epoch=0,
                members=(MemberPlan(worker_id=worker, span=whole),),
            )
            for worker in WORKERS
        )

    @property
    def _halves(self) -> tuple[MemberPlan, ...]:
        spans = Span(start=0, end=_CUT), Span(start=_CUT, end=NUM_LAYERS)
        return tuple(
            MemberPlan(worker_id=worker, span=span)
            for worker, span in zip(WORKERS, spans, strict=True)
        )

    @property
    def _next_epoch(self) -> int:
        return 1 if self._plan is None else self._plan.epoch + 1

    async def _change(self, groups: tuple[GroupPlan, ...], state: LayoutState) -> float:
        await self._publish(groups, state, PlanPhase.PREPARE)
        await self._all_said(AckState.PREPARED)
        committed_at = time.monotonic()
        await self._publish(groups, state, PlanPhase.COMMIT)
        await self._all_said(AckState.APPLIED, AckState.SETTLED)
        return committed_at

    async def _publish(
        self, groups: tuple[GroupPlan, ...], state: LayoutState, phase: PlanPhase
    ) -> None:
        before = () if self._plan is None else self._plan.groups
        change = Change(cause="benchmark", started_at=time.time(), previous_groups=before)
        self._plan = Plan(
            term=1,
            epoch=self._next_epoch,
            state=state,
            phase=phase,
            model_id="builtin:smollm2",
            num_layers=NUM_LAYERS,
            groups=groups,
            created_at=time.time(),
            change=None if state is LayoutState.STABLE else change,
        )
        await self._plans.put(PLAN_KEY, self._plan.encode())

    async def _all_said(self, *states: AckState) -> None:
        async def said() -> bool:
            if self._listening.done():
                self._listening.result()  # raises what ended it
            version = None if self._plan is None else self._plan.version
            news = [ack for ack in self._acks.values() if (ack.term, ack.epoch) == version]
            for ack in news:
                if ack.state in (AckState.REFUSED, AckState.FAILED):
                    raise ServerError(f"a worker refused the layout: {ack}")
            return sum(ack.state in states for ack in news) == len(WORKERS)

        await self.wait_until(said, f"no ack {states}")

    # --- requests --------------------------------------------------------------------------------

    async def generate(self, worker: str, group_id: str, num_prompt: int, num_output: int) -> str:
        """Send a request with a random prompt; returns its id."""
        self._num_requests += 1
        name = f"r{self._num_requests}"
        prompt = [self._random.randrange(100, _VOCAB_SIZE) for _ in range(num_prompt)]
        request = GenerateRequest(
            request_id=name,
            router_id=_ROUTER,
            attempt=0,
            group_id=group_id,
            epoch=1,
            dispatch_number=self._num_requests,
            prompt_token_ids=pack_token_ids(prompt),
            sampling=SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True),
        )
        subject = _SUBJECTS.generate(worker)
        answer = await self._bus.request(
            subject, request.encode(), timeout_seconds=_DEADLINE_SECONDS
        )
        reply = GenerateReply.decode(answer)
        if reply.status is not GenerateStatus.ACCEPTED:
            raise ServerError(f"{worker} refused a request: {reply}")
        return name

    async def started(self, names: Sequence[str]) -> None:
        """Return when each of these streams has a token."""

        async def started() -> bool:
            return all(self.token_times[name] for name in names)

        await self.wait_until(started, "streams do not start")

    async def cancel(self, names: Sequence[str]) -> None:
        """End these streams; returns when the orders are out."""
        for name in names:
            for worker in WORKERS:
                message = Cancel(request_id=name, attempt=0).encode()
                await self._bus.publish(_SUBJECTS.control(worker), message)

    async def idle(self) -> None:
        """Return when the workers have no request left."""

        async def idle() -> bool:
            found = [await self.metrics(worker) for worker in WORKERS]
            return not any(
                metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]
                for metrics in found
            )

        await self.wait_until(idle, "requests do not end")

    async def _on_frame(self, message: BusMessage) -> None:
        now = time.monotonic()
        for item in TokenFrame.decode(message.payload).items:
            self.token_times[item.request_id] += [now] * len(item.token_ids)
            if item.error or item.finish_reason is FinishReason.LOST:
                self._failure = f"request {item.request_id} failed: {item.error or 'lost'}"

    # --- looking ---------------------------------------------------------------------------------

    async def metrics(self, worker: str) -> Metrics:
        """All samples of a worker, by name and labels: `name` or `name{value}`."""
        url = f"http://127.0.0.1:{self._ports[worker]}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            families = text_string_to_metric_families(await response.text())
        found: Metrics = defaultdict(float)
        for sample in (sample for family in families for sample in family.samples):
            labels = ",".join(sample.labels.values())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] += sample.value
        return found

    async def wait_until(self, condition: Callable[[], Awaitable[bool]], complaint: str) -> None:
        """Poll `condition` until it holds.

        Raises:
            ServerError: it does not in time, or a request has failed, so that figures mean nothing.
        """
        ends_at = time.monotonic() + _DEADLINE_SECONDS
        while not await condition():
            if self._failure:
                raise ServerError(self._failure)
            if time.monotonic() > ends_at:
                raise ServerError(f"{complaint} within {_DEADLINE_SECONDS:g} s")
            await asyncio.sleep(_POLL_SECONDS)


@asynccontextmanager
async def drop_cluster(log_dir: Path, arguments: Sequence[str]) -> AsyncIterator[DropCluster]:
    """Two replicas, started with `arguments`, on a NATS server of their own."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(EmbeddedNats())
        ports = [free_port() for _ in WORKERS]
        processes = []
        for worker, port in zip(WORKERS, ports, strict=True):
            command = [sys.executable, "-m", "services.cli", "worker", "--worker-id", worker]
            command += ["--nats", server.url, "--admin-port", str(port), *arguments]
            process = ManagedProcess(command, log_path=log_dir / f"{worker}.log")
            processes.append(await stack.enter_async_context(process))
        for process, port in zip(processes, ports, strict=True):
            live = f"http://127.0.0.1:{port}/live"
            await process.wait_ready(live, timeout_seconds=_DEADLINE_SECONDS)
        bus = await connect(server.url, service="bench", instance="bench")
        stack.push_async_callback(bus.close)
        cluster = DropCluster(bus, ports)
        await cluster.start()
        stack.push_async_callback(cluster.close)
        yield cluster
