"""A cluster of two workers under a steady load, in one layout after the other.

start --warm up--> replicas: load --drop--> pipeline: load --stop
                             |<- settle ->|<- window ->|
workers' counters are read at both ends of the window
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.client import ClosedLoop, PlannedRequest, Target, run_load, served_model
from benchmarks.metrics import LoadSummary, RequestRecord, summarise
from benchmarks.processes import ManagedProcess, ServerError, free_port
from benchmarks.workload import TextPrompts
from services.worker.engine.config import ChunkPolicy
from shared.embedded_nats import EmbeddedNats
from shared.layout import LayoutState

READY_SECONDS = 90.0
DROP_SECONDS = 30.0
POLL_SECONDS = 0.1
WORKERS = ("worker-a", "worker-b")
_COUNTERS = {
    "tokens": "kunserve_worker_tokens_total",
    "busy": "kunserve_stage_busy_seconds_total",
    "bubble": "kunserve_stage_bubble_seconds_total",
    "error": "kunserve_cost_model_mean_error",
    "p90": "kunserve_cost_model_p90_error",
}


@dataclass(frozen=True, slots=True)
class SteadyLoad:
    """Requests that are sent as others end; lengths vary so that they do not march in step."""

    prompts: TextPrompts
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    settle_seconds: float
    window_seconds: float

    def requests(self, rng: random.Random) -> list[PlannedRequest]:
        """More than the time allows."""
        planned = []
        for _ in range(40 * self.concurrency):
            factor = rng.uniform(0.5, 1.5)
            num_tokens = round(self.prompt_tokens * rng.uniform(0.5, 1.5))
            prompt = self.prompts.draw(rng, num_tokens)
            planned.append(PlannedRequest(prompt, num_tokens, round(self.output_tokens * factor)))
        return planned


@dataclass(frozen=True, slots=True)
class StageResult:
    """One worker over the window. The shares are 0 for a replica."""

    worker_id: str
    layers: tuple[int, int]
    busy_seconds: float
    bubble_seconds: float
    cost_model_error: tuple[float, float]  # mean and P90 over the last batches

    @property
    def bubble_share(self) -> float:
        """Of the time in which the leader had work."""
        total = self.busy_seconds + self.bubble_seconds
        return self.bubble_seconds / total if total else 0.0


@dataclass(frozen=True, slots=True)
class LayoutResult:
    """One layout under load. The summary is of the requests that ended in the window."""

    name: str
    window_seconds: float
    tokens_per_second: float
    summary: LoadSummary
    stages: tuple[StageResult, ...]


class Cluster:
    """NATS, planner, router and two workers of one thread each."""

    def __init__(self, url: str, worker_urls: Sequence[str], processes: Sequence[ManagedProcess]):
        self.url = url
        self._worker_urls = worker_urls
        self._processes = processes

    async def view(self) -> dict[str, Any]:
        """What `GET /cluster` answers."""
        async with _session() as session, session.get(f"{self.url}/cluster") as response:
            view: dict[str, Any] = await response.json()
        return view

    async def is_dropped(self) -> bool:
        """Whether a drop is over and the workers serve as pipelines."""
        return bool((await self.view())["state"] == LayoutState.DROPPED.value)

    async def drop(self) -> None:
        """Make one pipeline of the workers; ServerError if that takes too long."""
        async with _session() as session:
            async with session.post(f"{self.url}/admin/drop", json={}) as response:
                if response.status != 200:
                    raise ServerError(f"the drop was refused: {await response.text()}")
            try:
                async with asyncio.timeout(DROP_SECONDS):
                    while not await self.is_dropped():  # noqa: ASYNC110 - it is another process
                        await asyncio.sleep(POLL_SECONDS)
            except TimeoutError as error:
                raise ServerError("the workers did not become a pipeline in time") from error

    async def counters(self) -> list[dict[str, float]]:
        """Each worker's counters now; what a worker does not have yet is 0."""
        for process in self._processes:
            process.check_running()
        found = []
        async with _session() as session:
            for url in self._worker_urls:
                async with session.get(f"{url}/metrics") as response:
                    families = text_string_to_metric_families(await response.text())
                samples = {s.name: s.value for family in families for s in family.samples}
                found.append({key: samples.get(name, 0.0) for key, name in _COUNTERS.items()})
        return found


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10.0))


@asynccontextmanager
async def running_cluster(
    model: Path, policy: ChunkPolicy, log_dir: Path, worker_options: Sequence[str]
) -> AsyncIterator[Cluster]:
    """Start a cluster, stop it at the end; ServerError where it does not start."""
    router_port, *worker_ports = (free_port() for _ in range(1 + len(WORKERS)))
    async with AsyncExitStack() as stack:
        nats = await stack.enter_async_context(EmbeddedNats())
        python = (sys.executable, "-m", "services.cli")

        async def start(service: str, name: str, *options: str) -> ManagedProcess:
            command = [*python, service, "--nats", nats.url, *options]
            process = ManagedProcess(command, log_path=log_dir / f"{policy.value}-{name}.log")
            return await stack.enter_async_context(process)

        planner = await start("planner", "planner", "--policy", "none")
        router = await start("router", "router", "--port", str(router_port), "--model", str(model))
        options = ("--model", str(model), "--threads", "1", "--chunk-policy", policy.value)
        workers = [
            await start(
                *("worker", name, "--worker-id", name, "--admin-port", str(port)),
                *(*options, *worker_options),
            )
            for name, port in zip(WORKERS, worker_ports, strict=True)
        ]
        url = f"http://127.0.0.1:{router_port}"
        urls = [f"http://127.0.0.1:{port}" for port in worker_ports]
        cluster = Cluster(url, urls, [planner, router, *workers])
        await router.wait_ready(f"{url}/ready", timeout_seconds=READY_SECONDS)
        for process, address in zip(workers, urls, strict=True):
            await process.wait_ready(f"{address}/ready", timeout_seconds=READY_SECONDS)
        yield cluster


async def measure(cluster: Cluster, name: str, load: SteadyLoad, seed: int) -> LayoutResult:
    """Put the cluster as it is under the load."""
    target = Target(cluster.url, await served_model(cluster.url))
    requests = load.requests(random.Random(seed))
    records: list[RequestRecord] = []
    sending = asyncio.create_task(
        run_load(target, requests, ClosedLoop(load.concurrency), on_done=records.append)
    )
    try:
        await asyncio.sleep(load.settle_seconds)
        before, began_at = await cluster.counters(), time.monotonic()
        await asyncio.sleep(load.window_seconds)
        after, ended_at = await cluster.counters(), time.monotonic()
        layers = {w["id"]: tuple(w["layers"][0]) for w in (await cluster.view())["workers"]}
    finally:
        sending.cancel()
        await asyncio.wait([sending])
    ended = [r for r in records if r.chunk_times and began_at <= r.chunk_times[-1] <= ended_at]
    if errors := [record.error for record in records if record.error]:
        raise ServerError(f"a request failed: {errors[0]}")
    stages = tuple(
        StageResult(
            worker_id,
            layers[worker_id],
            busy_seconds=late["busy"] - early["busy"],
            bubble_seconds=late["bubble"] - early["bubble"],
            cost_model_error=(late["error"], late["p90"]),
        )
        for worker_id, early, late in zip(WORKERS, before, after, strict=True)
    )
    tokens = sum(late["tokens"] for late in after) - sum(early["tokens"] for early in before)
    seconds = ended_at - began_at
    return LayoutResult(name, seconds, tokens / seconds, summarise(ended), stages)
