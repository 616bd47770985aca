"""One run of the overload benchmark: a cluster of its own, one policy, one list of requests."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.client import ClosedLoop, OpenLoop, PlannedRequest, Target, run_load, served_model
from benchmarks.metrics import LoadSummary, RequestRecord, summarise
from benchmarks.overload_watch import ClusterWatch, LoadPoint, transition_starts
from benchmarks.overload_workload import Arrival
from benchmarks.processes import ManagedProcess, ServerError, free_port
from benchmarks.workload import PromptSource
from services.planner.settings import Policy
from shared.bus.nats import connect
from shared.embedded_nats import EmbeddedNats
from shared.layout import LayoutState

DEPLOYMENT = "default"
READY_SECONDS = 120.0
#: How long after its last request a cluster gets to be at rest with whole replicas again.
RESTORE_SECONDS = 60.0
WARMUPS = 4
BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class ClusterSetup:
    """The cluster under test."""

    command: tuple[str, ...]
    log_dir: Path
    prompts: PromptSource


#: The requests for a cluster that has room for so many tokens of KV.
Workload = Callable[[int], Sequence[Arrival]]


@dataclass(frozen=True, slots=True)
class PolicyRun:
    """What one policy did with one list of requests. Times are seconds from the first arrival.

    Attributes:
        drops, restores: when each was committed.
        is_restored: all workers were whole replicas at the end.
        waiting_at_restore: requests that waited when each restore began.
    """

    policy: Policy
    seed: int
    arrivals: Sequence[Arrival]
    summary: LoadSummary
    burst: LoadSummary
    records: Sequence[RequestRecord]
    load: Sequence[LoadPoint]
    drops: Sequence[float]
    restores: Sequence[float]
    num_preemptions: int
    is_restored: bool
    waiting_at_restore: Sequence[int]
    transitions: Sequence[dict[str, Any]]

    @property
    def peak_demand(self) -> float:
        """Highest demand as a share of the capacity at the start."""
        return max(p.demand_blocks for p in self.load) / self.load[0].capacity_blocks

    @property
    def peak_capacity(self) -> float:
        """Highest capacity as a share of that at the start."""
        return max(p.capacity_blocks for p in self.load) / self.load[0].capacity_blocks


async def measure_policy(
    setup: ClusterSetup, policy: Policy, seed: int, workload: Workload
) -> PolicyRun:
    """Start a cluster, send the requests at their times, wait until it is at rest, stop it.

    Raises ServerError where the cluster does not start or dies.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    name = f"overload-{policy.value}-{seed}"
    async with EmbeddedNats() as nats:
        command = [*setup.command, "--port", str(port), "--nats", nats.url]
        bus = await connect(nats.url, service="bench", instance=name)
        watch = ClusterWatch()
        process = ManagedProcess(
            [*command, "--policy", policy.value], log_path=setup.log_dir / f"{name}.log"
        )
        try:
            async with process:
                await process.wait_ready(f"{url}/ready", timeout_seconds=READY_SECONDS)
                listening = asyncio.create_task(watch.run(bus, DEPLOYMENT))
                try:
                    return await _drive(setup, policy, seed, workload, url, watch)
                finally:
                    listening.cancel()
                    await asyncio.wait([listening])
        finally:
            await bus.close()


async def _drive(
    setup: ClusterSetup,
    policy: Policy,
    seed: int,
    workload: Workload,
    url: str,
    watch: ClusterWatch,
) -> PolicyRun:
    target = Target(url, await served_model(url))
    rng = random.Random(seed)
    await _warm_up(target, setup.prompts, rng)
    groups = (await _cluster(url))["groups"]
    arrivals = workload(sum(group["kv_blocks_total"] for group in groups) * BLOCK_TOKENS)
    requests = [
        PlannedRequest(
            setup.prompts.draw(rng, arrival.prompt_tokens),
            arrival.prompt_tokens,
            arrival.output_tokens,
        )
        for arrival in arrivals
    ]
    preemptions_before = watch.num_preemptions
    started_at = time.monotonic()
    schedule = OpenLoop(tuple(arrival.seconds for arrival in arrivals))
    records = await run_load(target, requests, schedule)
    is_restored = await watch.wait_state(LayoutState.STABLE, RESTORE_SECONDS)
    records = [_shifted(record, started_at) for record in records]
    restores = _since(transition_starts(watch.layouts, LayoutState.RESTORING), started_at)
    load = [
        dataclasses.replace(point, at=point.at - started_at)
        for point in watch.series()
        if point.at >= started_at
    ]
    return PolicyRun(
        policy=policy,
        seed=seed,
        arrivals=arrivals,
        summary=summarise(records),
        burst=summarise(
            [record for record, arrival in zip(records, arrivals, strict=True) if arrival.in_burst]
        ),
        records=records,
        load=load,
        drops=_since(transition_starts(watch.layouts, LayoutState.DROPPING), started_at),
        restores=restores,
        num_preemptions=watch.num_preemptions - preemptions_before,
        is_restored=is_restored,
        waiting_at_restore=[_waiting_at(load, at) for at in restores],
        transitions=await _transitions(url),
    )


async def _warm_up(target: Target, prompts: PromptSource, rng: random.Random) -> None:
    planned = [PlannedRequest(prompts.draw(rng, 64), 64, 8) for _ in range(WARMUPS)]
    records = await run_load(target, planned, ClosedLoop(2))
    errors = [record.error for record in records if record.error]
    if errors:
        raise ServerError(f"the cluster failed its warm-up: {errors[0]}")


async def _cluster(url: str) -> dict[str, Any]:
    """What `GET /cluster` answers."""
    timeout = aiohttp.ClientTimeout(total=10)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(f"{url}/cluster") as response,
    ):
        view: dict[str, Any] = await response.json()
    return view


async def _transitions(url: str) -> list[dict[str, Any]]:
    """The past drops and restores as `/cluster` tells them."""
    told = (LayoutState.DROPPING.value, LayoutState.RESTORING.value)
    transitions = (await _cluster(url))["transitions"]
    return [transition for transition in transitions if transition["state"] in told]


def _shifted(record: RequestRecord, origin: float) -> RequestRecord:
    chunk_times = tuple(at - origin for at in record.chunk_times)
    return dataclasses.replace(record, sent_at=record.sent_at - origin, chunk_times=chunk_times)


def _since(moments: Iterable[float], origin: float) -> list[float]:
    return [at - origin for at in moments if at >= origin]


def _waiting_at(load: Sequence[LoadPoint], at: float) -> int:
    """Requests that waited at a moment."""
    before = [point for point in load if point.at <= at]
    return before[-1].requests_waiting if before else 0
