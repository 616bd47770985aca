"""A streaming client of OpenAI-compatible servers that stamps every token event.

    ClosedLoop   `concurrency` readers, each sends its next request when the last one has ended
    OpenLoop     each request is sent at its own arrival time, whatever the server is doing

Used by `benchmarks.load` and `benchmarks.serving`; the figures are computed in `metrics`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import aiohttp

from benchmarks.metrics import RequestRecord
from benchmarks.workload import Prompt


class LengthControl(StrEnum):
    """How a server is told to generate exactly the wanted number of tokens."""

    IGNORE_EOS = "ignore-eos"  # vLLM's `ignore_eos` and `min_tokens`, which KunServe knows too
    GENERATION_CONFIG = "generation-config"  # `transformers serve`: an end token that never comes
    NONE = "none"  # only `max_tokens`; answers may be shorter

    def fields(self, output_tokens: int) -> dict[str, Any]:
        """Request fields for an answer of `output_tokens`."""
        match self:
            case LengthControl.IGNORE_EOS:
                return {"ignore_eos": True, "min_tokens": output_tokens}
            case LengthControl.GENERATION_CONFIG:
                config = {"eos_token_id": -1, "do_sample": False, "max_new_tokens": output_tokens}
                return {"generation_config": json.dumps(config)}
            case LengthControl.NONE:
                return {}


@dataclass(frozen=True, slots=True)
class Target:
    """A server under load. `headers` carries an API key where one is needed."""

    base_url: str
    model: str
    length_control: LengthControl = LengthControl.IGNORE_EOS
    headers: Mapping[str, str] | None = None
    timeout_seconds: float = 600.0


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request to send; `prompt_tokens` is its length by our own tokenizer."""

    prompt: Prompt
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Keep `concurrency` requests in flight until all are done."""

    concurrency: int


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Send request i at `arrivals_seconds[i]` after the start."""

    arrivals_seconds: tuple[float, ...]


Schedule = ClosedLoop | OpenLoop


class StreamParser:
    """Reads the events of one completion stream; `now` is the time an event arrived at."""

    def __init__(self) -> None:
        self.chunk_times: list[float] = []
        self.finish_reason = ""
        self.error = ""
        self.usage: dict[str, int] = {}

    def feed(self, line: bytes, now: float) -> None:
        """Take one line of the body. Comments, blank lines and the `[DONE]` mark are no events."""
        if not line.startswith(b"data:"):
            return
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if event.get("error"):
            self.error = f"server error in the stream: {event['error']}"
            return
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            if choice.get("text"):
                self.chunk_times.append(now)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def problem(self, planned: PlannedRequest, control: LengthControl) -> str:
        """Why the finished stream is not a valid answer to `planned`; empty where it is."""
        if self.error:
            return self.error
        if not self.finish_reason:
            return "the stream ended without a finish_reason"
        tokens = self.output_tokens
        if control is not LengthControl.NONE and tokens != planned.output_tokens:
            return f"{tokens} output tokens instead of {planned.output_tokens}"
        return ""

    @property
    def output_tokens(self) -> int:
        """The server's own count where it gives one, else one per chunk."""
        return self.usage.get("completion_tokens", len(self.chunk_times))


async def served_model(base_url: str) -> str:
    """The name of the first model that a server lists."""
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
        session.get(f"{base_url}/v1/models") as response,
    ):
        models = await response.json()
    name: str = models["data"][0]["id"]
    return name


async def send_request(
    session: aiohttp.ClientSession, target: Target, index: int, planned: PlannedRequest
) -> RequestRecord:
    """Send one completion request and read its stream to the end; failures are recorded."""
    body = {
        "model": target.model,
        "prompt": planned.prompt,
        "max_tokens": planned.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.length_control.fields(planned.output_tokens),
    }
    parser = StreamParser()
    sent_at = time.monotonic()
    try:
        async with session.post(f"{target.base_url}/v1/completions", json=body) as response:
            if response.status == 200:
                async for line in response.content:
                    parser.feed(line, time.monotonic())
                error = parser.problem(planned, target.length_control)
            else:
                error = f"HTTP {response.status}: {(await response.text())[:500]}"
    except (aiohttp.ClientError, TimeoutError, ValueError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    return RequestRecord(
        index=index,
        sent_at=sent_at,
        chunk_times=tuple(parser.chunk_times),
        output_tokens=parser.output_tokens,
        prompt_tokens=parser.usage.get("prompt_tokens", planned.prompt_tokens),
        error=error,
    )


async def run_load(
    target: Target,
    requests: Sequence[PlannedRequest],
    schedule: Schedule,
    *,
    on_done: Callable[[RequestRecord], None] = lambda record: None,
) -> list[RequestRecord]:
    """Send all requests on the schedule; returns their records in the order of `requests`."""
    timeout = aiohttp.ClientTimeout(total=target.timeout_seconds)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, headers=target.headers
    ) as session:
        records: dict[int, RequestRecord] = {}

        async def send(index: int) -> None:
            record = await send_request(session, target, index, requests[index])
            records[index] = record
            on_done(record)

        match schedule:
            case ClosedLoop(concurrency):
                await _closed_loop(send, len(requests), concurrency)
            case OpenLoop(arrivals_seconds):
                await _open_loop(send, arrivals_seconds)
    return [records[index] for index in sorted(records)]


async def _closed_loop(
    send: Callable[[int], Coroutine[None, None, None]], count: int, concurrency: int
) -> None:
    pending = iter(range(count))

    async def reader() -> None:
        for index in pending:
            await send(index)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, count)):
            group.create_task(reader())


async def _open_loop(
    send: Callable[[int], Coroutine[None, None, None]], arrivals_seconds: Sequence[float]
) -> None:
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    async with asyncio.TaskGroup() as group:
        for index, arrival in enumerate(arrivals_seconds):
            await asyncio.sleep(max(0.0, started_at + arrival - loop.time()))
            group.create_task(send(index))
