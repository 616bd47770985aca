"""Latency and throughput of a load run, computed from what a client saw. Pure: no clock, no I/O.

    sent          first chunk                      last chunk
      |--- TTFT ------|-- gap --|-- gap --| ... --|
      |------------------ E2E --------------------|

A chunk is a server-sent event with non-empty text, so a role-only or usage-only event is no token.
TPOT is (E2E - TTFT) / (output_tokens - 1), as vLLM's and aiperf's reports define it. A gap is the
time between two consecutive chunks; the largest one of a request is the stall its reader sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What the client saw of one request. Times are seconds of one monotonic clock."""

    index: int
    sent_at: float
    chunk_times: tuple[float, ...]
    output_tokens: int
    prompt_tokens: int
    error: str = ""

    @property
    def succeeded(self) -> bool:
        """True for a request that streamed at least one token and ended without an error."""
        return not self.error and bool(self.chunk_times)

    @property
    def ttft_seconds(self) -> float:
        return self.chunk_times[0] - self.sent_at

    @property
    def e2e_seconds(self) -> float:
        return self.chunk_times[-1] - self.sent_at

    @property
    def tpot_seconds(self) -> float | None:
        """Mean time per output token after the first; None for a single token."""
        if self.output_tokens < 2:
            return None
        return (self.chunk_times[-1] - self.chunk_times[0]) / (self.output_tokens - 1)

    @property
    def gaps_seconds(self) -> list[float]:
        """Times between consecutive chunks; empty for a single chunk."""
        return [later - earlier for earlier, later in pairwise(self.chunk_times)]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Summary of a sample, in the unit of the sample."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """One load run. A distribution is None where no request gave a value."""

    requests: int
    errors: int
    duration_seconds: float
    output_tokens: int
    output_tokens_per_second: float
    ttft_seconds: Distribution | None
    tpot_seconds: Distribution | None
    gap_seconds: Distribution | None
    max_gap_seconds: Distribution | None
    e2e_seconds: Distribution | None


def percentile(sorted_values: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile of an ascending sample, linear between ranks (numpy's default).

    Raises ValueError for an empty sample or a percentage outside [0, 100].
    """
    if not sorted_values:
        raise ValueError("an empty sample has no percentiles")
    if not 0 <= percent <= 100:
        raise ValueError(f"percentage {percent} is outside [0, 100]")
    rank = (len(sorted_values) - 1) * percent / 100
    low, high = math.floor(rank), math.ceil(rank)
    weight = rank - low
    return sorted_values[low] * (1 - weight) + sorted_values[high] * weight


def distribution(values: Iterable[float]) -> Distribution | None:
    """Summarise a sample in any order; None where it is empty."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Distribution(
        count=len(ordered),
        mean=math.fsum(ordered) / len(ordered),
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p99=percentile(ordered, 99),
        max=ordered[-1],
    )


def summarise(records: Sequence[RequestRecord]) -> LoadSummary:
    """Summarise a load run; latencies and tokens are those of the requests that succeeded.

    The duration runs from the first request sent to the last chunk received.
    """
    done = [record for record in records if record.succeeded]
    duration = 0.0
    if done:
        started_at = min(record.sent_at for record in records)
        duration = max(record.chunk_times[-1] for record in done) - started_at
    tokens = sum(record.output_tokens for record in done)
    tpots = [record.tpot_seconds for record in done]
    gaps = [record.gaps_seconds for record in done]
    return LoadSummary(
        requests=len(records),
        errors=len(records) - len(done),
        duration_seconds=duration,
        output_tokens=tokens,
        output_tokens_per_second=tokens / duration if duration > 0 else 0.0,
        ttft_seconds=distribution(record.ttft_seconds for record in done),
        tpot_seconds=distribution(tpot for tpot in tpots if tpot is not None),
        gap_seconds=distribution(gap for request_gaps in gaps for gap in request_gaps),
        max_gap_seconds=distribution(max(request_gaps) for request_gaps in gaps if request_gaps),
        e2e_seconds=distribution(record.e2e_seconds for record in done),
    )
