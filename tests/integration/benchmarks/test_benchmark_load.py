"""The load client against a real HTTP server of our own: pace, records, failures."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from benchmarks.client import (
    ClosedLoop,
    LengthControl,
    OpenLoop,
    PlannedRequest,
    Target,
    run_load,
    served_model,
)


class Server:
    """Streams as many tokens as asked for; fails prompts that say so."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.most_running = 0
        self._running = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if body["prompt"] == "refuse":
            return web.json_response({"error": {"message": "too busy"}}, status=503)
        self._running += 1
        self.most_running = max(self.most_running, self._running)
        try:
            return await self._stream(request, body)
        finally:
            self._running -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        total = 1 if body["prompt"] == "cut short" else body["max_tokens"]
        for number in range(total):
            reason = "length" if number == total - 1 else None
            choice = {"index": 0, "text": f"t{number} ", "finish_reason": reason}
            await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            await asyncio.sleep(0.001)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "a-model"}]})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    instance = Server()
    app = web.Application()
    app.router.add_post("/v1/completions", instance.complete)
    app.router.add_get("/v1/models", instance.models)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    instance.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield instance
    await runner.cleanup()


def planned(count: int, prompt: str = "hello") -> list[PlannedRequest]:
    return [PlannedRequest(prompt, prompt_tokens=1, output_tokens=5) for _ in range(count)]


async def test_a_closed_loop_keeps_its_concurrency(server: Server) -> None:
    records = await run_load(Target(server.url, "m"), planned(20), ClosedLoop(4))
    assert [record.index for record in records] == list(range(20))
    assert all(record.succeeded for record in records)
    assert {record.output_tokens for record in records} == {5}
    assert server.most_running == 4


async def test_an_open_loop_sends_at_its_times_whatever_is_running(server: Server) -> None:
    arrivals = (0.0, 0.05, 0.1)
    records = await run_load(Target(server.url, "m"), planned(3), OpenLoop(arrivals))
    sent = [record.sent_at - records[0].sent_at for record in records]
    assert all(moment >= arrival - 0.02 for moment, arrival in zip(sent, arrivals, strict=True))
    assert all(record.succeeded for record in records)


async def test_times_of_a_request_are_in_order(server: Server) -> None:
    (record,) = await run_load(Target(server.url, "m"), planned(1), ClosedLoop(1))
    times = [record.sent_at, *record.chunk_times]
    assert times == sorted(times)
    assert len(record.chunk_times) == 5


@pytest.mark.parametrize(
    ("prompt", "error"),
    [("refuse", "HTTP 503: .*too busy"), ("cut short", "1 output tokens instead of 5")],
)
async def test_failures_are_recorded_and_do_not_stop_the_run(
    server: Server, prompt: str, error: str
) -> None:
    requests = [*planned(1), *planned(1, prompt), *planned(1)]
    records = await run_load(Target(server.url, "m"), requests, ClosedLoop(1))
    assert [bool(record.error) for record in records] == [False, True, False]
    assert re.search(error, records[1].error)


async def test_a_server_that_is_not_there_is_an_error_per_request() -> None:
    records = await run_load(Target("http://127.0.0.1:9", "m"), planned(2), ClosedLoop(2))
    assert all("Connect" in record.error for record in records)


async def test_length_fields_are_left_out_on_demand(server: Server) -> None:
    await run_load(Target(server.url, "m"), planned(1), ClosedLoop(1))
    await run_load(Target(server.url, "m", LengthControl.NONE), planned(1), ClosedLoop(1))
    assert server.bodies[0]["ignore_eos"] is True
    assert "ignore_eos" not in server.bodies[1]
    assert "min_tokens" not in server.bodies[1]


async def test_the_served_model_is_asked_for(server: Server) -> None:
    assert await served_model(server.url) == "a-model"
