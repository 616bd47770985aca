"""The requests of the overload benchmark: when each arrives and how long it is. Pure.

`traces/azure_burst.csv` holds two minutes of both Azure LLM inference traces 2023 around the
largest burst of the code trace (seconds 840 to 960 of each). As TraceUpscaler does, arrival times
and request bodies are taken apart:

    burst   arrivals of the code trace, thinned until the burst needs the wanted KV
    base    arrivals of the conversation trace, thinned to a low steady rate
    bodies  lengths of the conversation trace, in their order from a random place on; both lengths
            are scaled to the model

Everything random comes from the seed: equal seeds give equal requests, whatever serves them.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TRACE_PATH = Path(__file__).parent / "traces" / "azure_burst.csv"
#: The burst, in seconds of the trace: 493 arrivals in 20 s, after 11 in the 10 s before.
BURST_SECONDS = (10.0, 30.0)
BURST_TRACE, BODY_TRACE = "code", "conv"


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    trace: str
    arrival_seconds: float
    context_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class Scaling:
    """How a trace is fitted to the model and the machine.

    Attributes:
        time: seconds here for one second of the trace.
        until_seconds: of the trace; later arrivals of the burst's trace are left out.
        base_seconds: for how long (here) requests of the base arrive.
    """

    context: float
    output: float
    time: float
    until_seconds: float
    base_per_second: float
    base_seconds: float
    max_context_tokens: int
    max_output_tokens: int
    min_tokens: int = 8


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the benchmark."""

    seconds: float
    prompt_tokens: int
    output_tokens: int
    in_burst: bool

    @property
    def tokens(self) -> int:
        """Tokens of KV that it needs at its end."""
        return self.prompt_tokens + self.output_tokens


def read_trace(path: Path = TRACE_PATH) -> list[TraceRow]:
    """The rows of a trace, in the order of their arrival."""
    with path.open(newline="") as file:
        return [
            TraceRow(
                row["trace"],
                float(row["arrival_seconds"]),
                int(row["context_tokens"]),
                int(row["generated_tokens"]),
            )
            for row in csv.DictReader(file)
        ]


def plan_arrivals(
    rows: Sequence[TraceRow], scaling: Scaling, burst_tokens: int, seed: int
) -> list[Arrival]:
    """Requests whose burst needs `burst_tokens` of KV, in the order of their arrival.

    Raises ValueError where the trace has too few requests for such a burst.
    """
    rng = random.Random(seed)
    bodies = _bodies([row for row in rows if row.trace == BODY_TRACE], scaling, rng)
    times = [row.arrival_seconds for row in rows if row.trace == BURST_TRACE]
    start, end = BURST_SECONDS
    inside = [time for time in times if start <= time < end]
    burst = _burst(inside, bodies, scaling, burst_tokens, rng)
    share = len(burst) / len(inside)
    others = [
        time
        for time in times
        if not start <= time < end and time < scaling.until_seconds and rng.random() < share
    ]
    around = [_arrival(time * scaling.time, next(bodies), False) for time in others]
    base = [_arrival(time, next(bodies), False) for time in _base(rows, scaling, rng)]
    return sorted([*burst, *around, *base], key=lambda arrival: arrival.seconds)


def _burst(
    times: Sequence[float],
    bodies: Iterator[tuple[int, int]],
    scaling: Scaling,
    burst_tokens: int,
    rng: random.Random,
) -> list[Arrival]:
    """Arrivals of the burst, chosen at random until they need the wanted KV."""
    burst: list[Arrival] = []
    needed = 0
    for time in rng.sample(times, len(times)):
        if needed >= burst_tokens:
            return burst
        burst.append(_arrival(time * scaling.time, next(bodies), True))
        needed += burst[-1].tokens
    raise ValueError(f"the burst of the trace needs {needed} tokens at most, not {burst_tokens}")


def _base(rows: Sequence[TraceRow], scaling: Scaling, rng: random.Random) -> list[float]:
    """Times of the base, in its trace's own pattern."""
    times = [row.arrival_seconds for row in rows if row.trace == BODY_TRACE]
    stretch = scaling.base_seconds / times[-1]
    share = scaling.base_per_second * scaling.base_seconds / len(times)
    return [time * stretch for time in times if rng.random() < share]


def _bodies(
    rows: Sequence[TraceRow], scaling: Scaling, rng: random.Random
) -> Iterator[tuple[int, int]]:
    """Scaled lengths of prompts and outputs, for ever."""
    index = rng.randrange(len(rows))
    while True:
        row = rows[index % len(rows)]
        prompt = math.ceil(row.context_tokens * scaling.context)
        output = math.ceil(row.generated_tokens * scaling.output)
        yield (
            min(max(prompt, scaling.min_tokens), scaling.max_context_tokens),
            min(max(output, scaling.min_tokens), scaling.max_output_tokens),
        )
        index += 1


def _arrival(seconds: float, body: tuple[int, int], in_burst: bool) -> Arrival:
    return Arrival(seconds, body[0], body[1], in_burst)
