"""Sending an answer, as one JSON object or as a stream of events; the same for both endpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
from aiohttp import web

from services.router.api.generation import ClientWatch, OutputRun, merged_deltas
from services.router.api.output import Delta, merge_deltas
from services.router.api.schemas import GenerationRequest
from services.router.api.sse import DONE, event, open_stream
from services.router.errors import ApiError

Usage = Mapping[str, int]


class AnswerFormat(Protocol):
    """How one endpoint writes its answers. Made anew for each request."""

    def chunk(self, index: int, delta: Delta, usage: Usage | None) -> bytes:
        """One event with what `delta` adds to choice `index`."""
        ...

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event that carries nothing but the usage."""
        ...

    def answer(self, outputs: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        """The whole answer, one output per choice."""
        ...


def usage_of(runs: Sequence[OutputRun]) -> Usage:
    """Token counts of an answer so far."""
    prompt = sum(run.num_prompt_tokens for run in runs)
    completion = sum(run.num_output_tokens for run in runs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


async def answer(
    request: web.Request,
    body: GenerationRequest,
    runs: Sequence[OutputRun],
    answer_format: AnswerFormat,
) -> web.StreamResponse:
    """Generate and send; closes the runs, so that nothing goes on for a client that is gone."""
    try:
        if not body.stream:
            return web.json_response(await _whole(runs, answer_format))
        options = _StreamOptions(
            include_usage=body.stream_options.include_usage,
            continuous_usage=body.stream_options.continuous_usage_stats,
        )
        return await _Streamer(request, runs, answer_format, options).run()
    finally:
        for run in runs:
            await run.close()


async def _whole(runs: Sequence[OutputRun], answer_format: AnswerFormat) -> dict[str, Any]:
    collected: list[list[Delta]] = [[] for _ in runs]
    async with aclosing(merged_deltas(runs)) as pieces:
        async for index, deltas in pieces:
            collected[index].extend(deltas)
    return answer_format.answer([merge_deltas(deltas) for deltas in collected], usage_of(runs))


@dataclass(frozen=True)
class _StreamOptions:
    include_usage: bool
    continuous_usage: bool


class _Streamer:
    """One event stream."""

    def __init__(
        self,
        request: web.Request,
        runs: Sequence[OutputRun],
        answer_format: AnswerFormat,
        options: _StreamOptions,
    ) -> None:
        self._request = request
        self._runs = runs
        self._format = answer_format
        self._options = options
        self._held: dict[int, Delta] = {}  # tokens whose text is not complete yet
        self._response: web.StreamResponse | None = None
        self._client = ClientWatch(runs[0], _connection_closer(request))

    async def run(self) -> web.StreamResponse:
        """Stream everything. An error before the first token is raised, later it is an event."""
        try:
            async with aclosing(merged_deltas(self._runs)) as pieces:
                async for index, deltas in pieces:
                    await self._write(b"".join([self._chunk(index, delta) for delta in deltas]))
            if self._options.include_usage:
                await self._write(self._format.usage_chunk(usage_of(self._runs)))
            await self._write(DONE)
        except ConnectionError:
            raise  # the client is gone
        except ApiError as error:
            if self._response is None:
                raise
            await self._write(event(error.body()))
        except Exception:
            if self._response is None:
                raise
            structlog.get_logger(component="api").exception("stream.failed")
            await self._write(event(ApiError("the router failed to go on").body()))
        return await self._opened()

    def _chunk(self, index: int, delta: Delta) -> bytes:
        """The event for a delta; tokens without text wait for the next one that has some."""
        if self._held and (held := self._held.pop(index, None)) is not None:
            delta = merge_deltas([held, delta])
        if not delta.text and delta.finish_reason is None:
            self._held[index] = delta
            return b""
        usage = usage_of(self._runs) if self._options.continuous_usage else None
        return self._format.chunk(index, delta, usage)

    async def _write(self, data: bytes) -> None:
        response = self._response or await self._opened()
        if data:
            with self._client:
                await response.write(data)

    async def _opened(self) -> web.StreamResponse:
        if self._response is None:
            self._response = await open_stream(self._request)
        return self._response


def _connection_closer(request: web.Request) -> Callable[[], None]:
    def close() -> None:
        if request.transport is not None:
            request.transport.abort()

    return close
