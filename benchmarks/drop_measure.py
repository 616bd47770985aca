"""What the drop benchmark does with its two workers, and what it looks at."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.drop_cluster import WORKERS, DropCluster, Metrics
from benchmarks.processes import ServerError

#: When each token of a stream came, by request.
TokenTimes = Mapping[str, Sequence[float]]
#: Where the layers come back from.
SOURCES = ("checkpoint", "peer")
#: Streams of each worker before the drop: their KV is the whole cache after some seconds.
_NUM_STREAMS = 10
_NUM_PROMPT_TOKENS = 192  # one batch
_NUM_OUTPUT_TOKENS = 1500  # more than are ever produced
#: Requests of each worker that find no room.
_NUM_QUEUED = 2
#: Streams that go on while the layers come back: less than half of what a replica holds.
_NUM_KEPT = 5
#: Share of the cache in use from which on a request of that length finds no room.
_FULL = 0.9
_WINDOW_SECONDS = 3.0
#: Tokens of the one long request in a transfer.
_TRANSFER_TOKENS = 1900


@dataclass(frozen=True, slots=True)
class DropFinding:
    """A drop with a queue, and the restore that follows, on busy workers. Seconds.

    Attributes:
        commit: until the memory of given-up layers was usable; one value for each worker.
        hand_over: from the leader's commit until the other worker had committed too.
        first_batch: from there until a batch was made.
        first_token: from there until that batch had passed the pipeline.
        queued_token: from the plan to the first token of the queue, as the client saw it.
        iteration: median time of a step of the pipeline at that load.
        exchange: of all running requests; `exchange_bytes` were sent and received by each worker.
        load: of the layers that come back, by worker, while the kept streams run.
        source_bytes, source_seconds: of that, by where it came from, both workers together.
        undisturbed_gaps, restoring_gaps, returning_gaps: between tokens, of the kept streams.
    """

    commit: list[float]
    commit_bytes: float
    hand_over: float
    first_batch: float
    first_token: float
    queued_token: float
    iteration: float
    exchange: float
    exchange_bytes: float
    load: list[float]
    load_bytes: float
    source_bytes: dict[str, float]
    source_seconds: dict[str, float]
    undisturbed_gaps: list[float]
    restoring_gaps: list[float]
    returning_gaps: list[float]
    undisturbed_tpots: list[float]
    restore_tpots: list[float]


@dataclass(frozen=True, slots=True)
class TransferFinding:
    """One long request changes its layout; nothing else runs.

    Attributes:
        seconds: from the first order until all is settled.
        num_bytes: in one direction.
    """

    seconds: float
    num_bytes: float

    @property
    def bytes_per_second(self) -> float:
        """To be compared with the link's."""
        return self.num_bytes / self.seconds


async def measure_drop(cluster: DropCluster) -> DropFinding:
    """Fill both caches, queue, drop, go on with few streams, restore."""
    before = [await cluster.metrics(worker) for worker in WORKERS]
    streams = await _start_streams(cluster, _NUM_STREAMS)
    await _filled(cluster)
    queued = [
        await cluster.generate(worker, f"g-{worker}", _NUM_PROMPT_TOKENS, _NUM_OUTPUT_TOKENS)
        for worker in WORKERS
        for _ in range(_NUM_QUEUED)
    ]
    if any(cluster.token_times[name] for name in queued):
        raise ServerError("the cache had room for a request that was to be queued")
    committed_at = await cluster.drop()
    await cluster.settled()
    await cluster.started(queued)
    settled_at = time.monotonic()
    await asyncio.sleep(1.0)
    iteration = _median(gaps(cluster.token_times, streams, settled_at))
    queued_token = min(cluster.token_times[name][0] for name in queued) - committed_at
    await cluster.cancel([*queued, *streams[_NUM_KEPT:]])
    kept = streams[:_NUM_KEPT]
    await asyncio.sleep(0.5)
    undisturbed_at = time.monotonic()
    await asyncio.sleep(_WINDOW_SECONDS)
    restoring_at = time.monotonic()
    await cluster.prepare_restore()
    returning_at = time.monotonic()
    await cluster.commit_restore()
    await cluster.settled()
    ended_at = time.monotonic()
    await cluster.cancel(kept)
    await cluster.idle()
    spent = [_difference(await cluster.metrics(w), b) for w, b in zip(WORKERS, before, strict=True)]
    return DropFinding(
        commit=[_phase(each, "commit") for each in spent],
        commit_bytes=_phase_bytes(spent[0], "commit"),
        hand_over=_phase(spent[0], "hand_over"),
        first_batch=_phase(spent[0], "first_batch"),
        first_token=_phase(spent[0], "first_token"),
        queued_token=queued_token,
        iteration=iteration,
        exchange=max(_phase(each, "exchange") for each in spent),
        exchange_bytes=_phase_bytes(spent[0], "exchange"),
        load=[_phase(each, "load") for each in spent],
        load_bytes=_phase_bytes(spent[0], "load"),
        source_bytes={s: sum(_phase_bytes(each, f"load_{s}") for each in spent) for s in SOURCES},
        source_seconds={s: sum(_phase(each, f"load_{s}") for each in spent) for s in SOURCES},
        undisturbed_gaps=gaps(cluster.token_times, kept, undisturbed_at, restoring_at),
        restoring_gaps=gaps(cluster.token_times, kept, restoring_at, returning_at),
        returning_gaps=gaps(cluster.token_times, kept, returning_at, ended_at),
        undisturbed_tpots=tpots(cluster.token_times, kept, undisturbed_at, restoring_at),
        restore_tpots=tpots(cluster.token_times, kept, restoring_at, ended_at),
    )


async def measure_transfer(cluster: DropCluster, home: str) -> TransferFinding:
    """Drop with one long request, whose KV is on `home`."""
    before = [await cluster.metrics(worker) for worker in WORKERS]
    streams = [await cluster.generate(home, f"g-{home}", _TRANSFER_TOKENS, 400)]
    await cluster.started(streams)
    await cluster.drop()
    await cluster.settled()
    await cluster.cancel(streams)
    await cluster.idle()
    spent = [_difference(await cluster.metrics(w), b) for w, b in zip(WORKERS, before, strict=True)]
    await cluster.prepare_restore()
    await cluster.commit_restore()
    await cluster.settled()
    seconds = max(_phase(each, "exchange") for each in spent)
    return TransferFinding(seconds, _phase_bytes(spent[0], "exchange"))


async def _filled(cluster: DropCluster) -> None:
    """Return when the caches of both workers are full, but for little."""

    async def full() -> bool:
        usage = [(await cluster.metrics(w))["vllm:kv_cache_usage_perc"] for w in WORKERS]
        return min(usage) >= _FULL

    await cluster.wait_until(full, "the caches do not fill")


async def _start_streams(cluster: DropCluster, count: int) -> list[str]:
    """Streams on both workers, in turn, each with a token."""
    streams = [
        await cluster.generate(worker, f"g-{worker}", _NUM_PROMPT_TOKENS, _NUM_OUTPUT_TOKENS)
        for _ in range(count)
        for worker in WORKERS
    ]
    await cluster.started(streams)
    return streams


def gaps(
    times: TokenTimes, names: Sequence[str], start: float, end: float = float("inf")
) -> list[float]:
    """Times between tokens of which the later came in `[start, end)`."""
    found = []
    for name in names:
        found += [late - early for early, late in pairwise(times[name]) if start <= late < end]
    return found


def tpots(times: TokenTimes, names: Sequence[str], start: float, end: float) -> list[float]:
    """Mean time for a token within `[start, end)`, for each stream."""
    found = []
    for name in names:
        own = gaps(times, [name], start, end)
        if own:
            found.append(sum(own) / len(own))
    return found


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _difference(after: Metrics, before: Metrics) -> Metrics:
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def _phase(metrics: Metrics, phase: str) -> float:
    return metrics.get(f"kunserve_phase_seconds_sum{{{phase}}}", 0.0)


def _phase_bytes(metrics: Metrics, phase: str) -> float:
    return metrics.get(f"kunserve_phase_bytes_total{{{phase}}}", 0.0)
