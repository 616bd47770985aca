"""One phase of the router benchmark: streams held open, probes sent meanwhile, texts checked."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import aiohttp

from benchmarks.metrics import Distribution, distribution
from benchmarks.processes import ServerError, cpu_seconds
from benchmarks.sse_capture import Capture, StreamEvents, capture_stream, parse_capture
from benchmarks.stub_engine import NUM_HOLD_DIGITS, StubVocabulary
from benchmarks.tokenizer import FileTokenizer
from benchmarks.workload import TextPrompts, gamma_arrivals

STUB_MODEL_NAME = "stub"

_PROBE_TOKENS = NUM_HOLD_DIGITS + 1
_RAMP_SECONDS = 5.0  # opening the streams may take so long


@dataclass(frozen=True, slots=True)
class Phase:
    """So many streams open for so long, and so many probes meanwhile."""

    streams: int
    duration_seconds: float
    probes_per_second: float


@dataclass(frozen=True, slots=True)
class Setup:
    """A running cluster of router and stubs."""

    url: str
    router_pid: int
    steps_per_second: float
    tokenizer: FileTokenizer
    vocabulary: StubVocabulary


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """What one phase gave. Latencies in seconds."""

    streams: int
    offered_events_per_second: float
    delivered_events_per_second: float
    router_cpu_share: float
    added_first_token: Distribution | None
    gaps: Distribution | None
    problems: list[str]


def hold_seconds(events: StreamEvents) -> float:
    """How long the stub held the request, from the first seven characters of its answer."""
    return int("".join(events.texts)[:NUM_HOLD_DIGITS]) / 1e6


def stream_problem(events: StreamEvents, expected_words: str) -> str:
    """What is wrong with a finished stream; empty where its text is what the stub sent."""
    if events.problem:
        return events.problem
    text = "".join(events.texts)
    if not text[:NUM_HOLD_DIGITS].isdigit() or text[NUM_HOLD_DIGITS:] != expected_words:
        return f"wrong text of {len(text)} characters, ends with {text[-30:]!r}"
    return "" if events.finish_reason == "length" else "no finish_reason"


def events_between(streams: Sequence[StreamEvents], start: float, end: float) -> int:
    """Events with text that arrived in `[start, end)`."""
    return sum(start <= moment < end for stream in streams for moment in stream.times)


class PhaseRunner:
    """Runs one phase against a setup."""

    def __init__(self, setup: Setup, session: aiohttp.ClientSession, rng: random.Random) -> None:
        self._setup = setup
        self._session = session
        self._rng = rng
        self._prompts = TextPrompts(setup.tokenizer)

    async def run(self, phase: Phase) -> PhaseResult:
        """Open the streams, measure while they flow, and wait for the last of them."""
        setup = self._setup
        steps = int(setup.steps_per_second * (phase.duration_seconds + _RAMP_SECONDS))
        stream_tokens = NUM_HOLD_DIGITS + steps
        streams = [Capture(sent_at=0.0) for _ in range(phase.streams)]
        bodies = [self._body(32, stream_tokens) for _ in streams]
        async with asyncio.TaskGroup() as group:
            for capture, body in zip(streams, bodies, strict=True):
                group.create_task(self._send(capture, body))
            await self._all_started(streams)
            cpu_before, started_at = cpu_seconds(setup.router_pid), time.monotonic()
            probes = await self._probe(phase)
            cpu_after, ended_at = cpu_seconds(setup.router_pid), time.monotonic()
        elapsed = ended_at - started_at
        background = [parse_capture(capture) for capture in streams]
        probed = [parse_capture(capture) for capture in probes]
        delivered = events_between([*background, *probed], started_at, ended_at) / elapsed
        return PhaseResult(
            streams=phase.streams,
            offered_events_per_second=phase.streams * setup.steps_per_second,
            delivered_events_per_second=delivered,
            router_cpu_share=(cpu_after - cpu_before) / elapsed,
            added_first_token=distribution(
                events.times[0] - capture.sent_at - hold_seconds(events)
                for capture, events in zip(probes, probed, strict=True)
                if events.times and not events.problem
            ),
            gaps=distribution(
                later - earlier
                for events in background
                for earlier, later in pairwise(events.times)
                if started_at <= earlier and later < ended_at
            ),
            problems=[
                *self._problems(background, stream_tokens),
                *self._problems(probed, _PROBE_TOKENS),
            ],
        )

    def _body(self, prompt_tokens: int, max_tokens: int) -> dict[str, Any]:
        return {
            "model": STUB_MODEL_NAME,
            "prompt": self._prompts.draw(self._rng, prompt_tokens),
            "max_tokens": max_tokens,
            "stream": True,
            "temperature": 0,
            "ignore_eos": True,
        }

    async def _send(self, capture: Capture, body: dict[str, Any]) -> None:
        capture.sent_at = time.monotonic()
        await capture_stream(self._session, f"{self._setup.url}/v1/completions", body, capture)

    async def _all_started(self, streams: Sequence[Capture]) -> None:
        deadline = time.monotonic() + _RAMP_SECONDS
        while not all(capture.pieces or capture.error for capture in streams):
            if time.monotonic() > deadline:
                started = sum(bool(capture.pieces) for capture in streams)
                raise ServerError(f"only {started} of {len(streams)} streams started in time")
            await asyncio.sleep(0.01)

    async def _probe(self, phase: Phase) -> list[Capture]:
        count = int(phase.duration_seconds * phase.probes_per_second)
        arrivals = gamma_arrivals(self._rng, count, phase.probes_per_second, shape=1.0)
        probes = [Capture(sent_at=0.0) for _ in range(count)]
        bodies = [self._body(128, _PROBE_TOKENS) for _ in probes]
        started_at = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for capture, body, arrival in zip(probes, bodies, arrivals, strict=True):
                await asyncio.sleep(max(0.0, started_at + arrival - time.monotonic()))
                group.create_task(self._send(capture, body))
        return probes

    def _problems(self, streams: Sequence[StreamEvents], num_tokens: int) -> list[str]:
        words = [self._setup.vocabulary.word(i) for i in range(NUM_HOLD_DIGITS, num_tokens)]
        expected = self._setup.tokenizer.decode(words)
        return [problem for events in streams if (problem := stream_problem(events, expected))]
