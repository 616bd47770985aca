"""What clients see when workers, frames, the bus or clients fail: the text they would have seen.

Stub workers draw each token from (seed, position), so equality of texts proves that a replay went
on at the right position with the right seed.
"""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from services.router import generator, watchdog
from services.router.generator import MAX_LOSSES
from shared.messages import GenerateStatus, unpack_token_ids
from tests.conftest import eventually
from tests.contract.router.router_requests import (
    COMPLETIONS,
    NUM_TOKENS,
    body,
    expected,
    undisturbed,
)
from tests.router_support import ASCII_TOKENS, Cluster, post_stream
from tests.stub_worker import StubBehaviour, hashed_token, publish_plan

# --- workers that fail ---------------------------------------------------------------------------


@pytest.mark.parametrize("die_at", [0, 1, NUM_TOKENS // 2, NUM_TOKENS - 1])
async def test_a_worker_dies_and_the_text_goes_on(
    cluster: Cluster, http: aiohttp.ClientSession, die_at: int
) -> None:
    await cluster.add_worker("w0", StubBehaviour(die_at=die_at))
    await cluster.add_router()
    await cluster.ready()
    running = asyncio.create_task(post_stream(http, cluster.url + COMPLETIONS, body()))
    await eventually(lambda: not cluster.workers["w0"].is_alive)
    await cluster.add_worker("w1")
    events = await running
    assert events.text == expected()
    assert events.finish_reasons == ["length"]
    assert events.is_done
    assert len(events.chunks) == NUM_TOKENS
    (replay,) = cluster.workers["w1"].requests
    assert unpack_token_ids(replay.output_token_ids) == [ord(t) for t in expected()[:die_at]]


async def test_all_streams_of_a_dead_worker_are_replayed(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    await cluster.add_worker("w0", StubBehaviour(die_at=15))
    await cluster.add_worker("w1")
    await cluster.add_router()
    await cluster.ready()
    answers = await asyncio.gather(
        *(post_stream(http, cluster.url + COMPLETIONS, body(seed)) for seed in range(40))
    )
    assert [events.text for events in answers] == [expected(seed) for seed in range(40)]
    assert not cluster.workers["w0"].is_alive
    await undisturbed(cluster)


async def test_a_replay_draws_the_same_tokens_where_the_client_gave_no_seed(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    await cluster.add_worker("w0", StubBehaviour(die_at=10))
    await cluster.add_router()
    await cluster.ready()
    request = {"prompt": "go", "max_tokens": NUM_TOKENS}
    running = asyncio.create_task(post_stream(http, cluster.url + COMPLETIONS, request))
    await eventually(lambda: not cluster.workers["w0"].is_alive)
    await cluster.add_worker("w1")
    events = await running
    (first,), (second,) = cluster.workers["w0"].requests, cluster.workers["w1"].requests
    assert second.sampling == first.sampling
    assert second.attempt > first.attempt
    assert events.text == expected(first.sampling.seed)


async def test_a_worker_that_gives_a_request_up_is_replaced(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    await cluster.add_worker("w0", StubBehaviour(abort_at=7))
    await cluster.add_router()
    await cluster.ready()
    running = asyncio.create_task(post_stream(http, cluster.url + COMPLETIONS, body()))
    await eventually(lambda: cluster.workers["w0"].requests)
    await cluster.add_worker("w1")
    cluster.workers["w0"].behaviour.refuse_with = GenerateStatus.DRAINING
    assert (await running).text == expected()


async def test_losing_its_kv_is_not_the_requests_fault_however_often(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    await cluster.add_worker("w0", StubBehaviour(loses_kv_after=1))
    await cluster.add_router()
    await cluster.ready()
    assert NUM_TOKENS > 2 * MAX_LOSSES
    assert (await post_stream(http, cluster.url + COMPLETIONS, body())).text == expected()
    assert len(cluster.workers["w0"].requests) == NUM_TOKENS


async def test_a_silent_worker_that_the_plan_has_dropped_is_given_up_at_once(
    cluster: Cluster, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others miss it, too; nothing else would end the wait here."""
    monkeypatch.setattr(watchdog, "GIVE_UP_SECONDS", float("inf"))
    monkeypatch.setattr(generator, "MAX_SILENT_RESUMES", float("inf"))
    await cluster.add_worker("w0", StubBehaviour(pause_at=10))
    await cluster.add_router()
    await cluster.ready()
    running = asyncio.create_task(post_stream(http, cluster.url + COMPLETIONS, body()))
    await eventually(lambda: cluster.workers["w0"].num_tokens == 10)
    await cluster.add_worker("w1")
    cluster.workers["w0"].behaviour.reports_load = False
    cluster.workers["w0"].behaviour.ignores_control = True
    await publish_plan(cluster.bus, ["w1"])
    assert (await running).text == expected()


async def test_a_restarted_worker_is_noticed_by_its_incarnation(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    await cluster.add_worker("w0", StubBehaviour(pause_at=10))
    await cluster.add_router()
    await cluster.ready()
    running = asyncio.create_task(post_stream(http, cluster.url + COMPLETIONS, body()))
    await eventually(lambda: cluster.workers["w0"].requests)
    await cluster.workers["w0"].kill()
    successor = await cluster.add_worker("w0")
    assert (await running).text == expected()
    assert not successor.resumed  # it cannot know the stream, so it is not asked


async def test_a_worker_that_hangs_before_answering_is_passed_over(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    await cluster.add_worker("w0", StubBehaviour(ignores_generate=True))
    await cluster.add_router(dispatch_timeout_seconds=0.2)
    await cluster.ready()
    running = asyncio.create_task(post_stream(http, cluster.url + COMPLETIONS, body()))
    await eventually(lambda: cluster.workers["w0"].requests)
    await cluster.add_worker("w1")
    assert (await running).text == expected()
    assert cluster.workers["w0"].cancelled  # it may have taken the request after all


async def test_tokens_count_as_the_answer_that_got_lost(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    await cluster.add_worker("w0", StubBehaviour(answers_after_accepting=False))
    await cluster.add_router(dispatch_timeout_seconds=0.3)
    await cluster.ready()
    events = await post_stream(http, cluster.url + COMPLETIONS, body())
    assert events.text == expected()
    assert len(cluster.workers["w0"].requests) == 1


async def test_a_silent_worker_that_forgot_the_stream_is_left(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    behaviour = StubBehaviour(pause_at=5, forgets_streams=True)
    await cluster.add_worker("w0", behaviour)
    await cluster.add_router()
    await cluster.ready()
    running = asyncio.create_task(post_stream(http, cluster.url + COMPLETIONS, body()))
    await eventually(lambda: cluster.workers["w0"].requests)
    await cluster.add_worker("w1")
    behaviour.refuse_with = GenerateStatus.OVERLOADED
    assert (await running).text == expected()


# --- frames that fail ----------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [{0}, {3}, {5, 6, 7}, set(range(2, 30, 2)), {NUM_TOKENS - 1}])
async def test_lost_frames_are_asked_for_again(
    cluster: Cluster, http: aiohttp.ClientSession, lost: set[int]
) -> None:
    await cluster.add_worker("w0", StubBehaviour(lose_frames=lost))
    await cluster.add_router()
    await cluster.ready()
    events = await post_stream(http, cluster.url + COMPLETIONS, body())
    assert events.text == expected()
    assert cluster.workers["w0"].resumed
    assert len(cluster.workers["w0"].requests) == 1


async def test_repeated_frames_change_nothing(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    await cluster.add_worker("w0", StubBehaviour(duplicate_frames=True))
    await cluster.add_router()
    await cluster.ready()
    events = await post_stream(http, cluster.url + COMPLETIONS, body())
    assert events.text == expected()
    assert len(events.chunks) == NUM_TOKENS


async def test_streams_survive_an_outage_of_the_bus(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    await cluster.add_worker("w0", StubBehaviour(step_seconds=0.02))
    await cluster.add_router()
    await cluster.ready()
    running = asyncio.create_task(post_stream(http, cluster.url + COMPLETIONS, body()))
    await eventually(lambda: cluster.workers["w0"].requests)
    cluster.server.stop()
    async with http.get(cluster.url + "/health") as response:
        assert response.status == 503
    cluster.server.start(wipe_store=True)
    assert (await running).text == expected()


# --- clients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_cancels_its_request(
    cluster: Cluster, http: aiohttp.ClientSession, stream: bool
) -> None:
    worker = await cluster.add_worker("w0", StubBehaviour(pause_at=5))
    await cluster.add_router()
    await cluster.ready()
    request = asyncio.create_task(
        post_stream(http, cluster.url + COMPLETIONS, body())
        if stream
        else http.post(cluster.url + COMPLETIONS, json=body()).__aenter__()
    )
    await eventually(lambda: worker.num_tokens == 5)  # from here on it sends nothing
    request.cancel()
    await eventually(lambda: worker.cancelled)
    assert worker.cancelled[0].request_id == worker.requests[0].request_id
    await undisturbed(cluster)


async def test_a_client_that_goes_away_while_waiting_leaves_the_queue(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    service = await cluster.add_router()
    request = asyncio.create_task(post_stream(http, cluster.url + COMPLETIONS, body()))
    await eventually(lambda: service.num_queued == 1)
    request.cancel()
    await eventually(lambda: service.num_queued == 0)
    assert len(service.context.generator) == 0


async def test_a_client_that_does_not_read_is_dropped(cluster: Cluster) -> None:
    worker = await cluster.add_worker(
        "w0",
        StubBehaviour(step_seconds=0.0005, max_model_len=100_000, kv_blocks_total=10_000),
        hashed_token(0x21, 0x7F),
    )
    service = await cluster.add_router(slow_client_timeout_seconds=0.3)
    await cluster.ready()
    port = int(cluster.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    payload = json.dumps(
        {
            "prompt": ["go"] * 100,
            "max_tokens": 400,
            "stream": True,
            "logprobs": 20,
            "stream_options": {"continuous_usage_stats": True},
        }
    ).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
    writer.write(head.encode() + payload)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    await eventually(lambda: worker.cancelled)
    await undisturbed(cluster)
    assert len(service.context.generator) == 0
    writer.close()


async def test_a_lost_cancel_is_sent_again(cluster: Cluster, http: aiohttp.ClientSession) -> None:
    """The worker goes on sending tokens nobody wants: it is told until it stops."""
    worker = await cluster.add_worker("w0", StubBehaviour(step_seconds=0.02))
    await cluster.add_router()
    await cluster.ready()
    worker.loses_cancels = 1
    request = asyncio.create_task(
        post_stream(http, cluster.url + COMPLETIONS, body(max_tokens=400))
    )
    await eventually(lambda: worker.num_running == 1)
    request.cancel()
    await eventually(lambda: len(worker.cancelled) >= 2)
    await undisturbed(cluster)


# --- routers -------------------------------------------------------------------------------------


async def test_two_routers_serve_side_by_side(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    for name in ("w0", "w1"):
        await cluster.add_worker(name)
    first = await cluster.add_router()
    second = await cluster.add_router()
    await cluster.ready()
    urls = [first.url, second.url] * 15
    answers = await asyncio.gather(
        *(post_stream(http, url + COMPLETIONS, body(seed)) for seed, url in enumerate(urls))
    )
    assert [events.text for events in answers] == [expected(seed) for seed in range(30)]
    assert all(worker.requests for worker in cluster.workers.values())


async def test_a_draining_router_finishes_and_refuses(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    worker = await cluster.add_worker("w0", StubBehaviour(step_seconds=0.01))
    await cluster.add_router()
    await cluster.ready()
    running = asyncio.create_task(post_stream(http, cluster.url + COMPLETIONS, body()))
    await eventually(lambda: worker.num_running == 1)
    ended = cluster.stop_router(0)
    await eventually(lambda: cluster.services[0].context.drain.is_draining)
    async with http.get(cluster.url + "/ready") as response:
        assert response.status == 503
    async with http.post(cluster.url + COMPLETIONS, json=body()) as response:
        assert response.status == 503
        assert "Retry-After" in response.headers
    assert (await running).text == expected()
    async with asyncio.timeout(10):
        await ended


async def test_a_drain_that_takes_too_long_cancels_what_is_left(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    worker = await cluster.add_worker("w0", StubBehaviour(pause_at=5))
    await cluster.add_router(drain_timeout_seconds=0.2)
    await cluster.ready()
    running = asyncio.create_task(post_stream(http, cluster.url + COMPLETIONS, body()))
    await eventually(lambda: worker.num_running == 1)
    async with asyncio.timeout(10):
        await cluster.stop_router(0)
    await eventually(lambda: worker.cancelled)
    with pytest.raises((aiohttp.ClientError, AssertionError)):
        assert (await running).is_done


async def test_two_hundred_streams_lose_and_repeat_nothing(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    for number in range(3):
        behaviour = StubBehaviour(lose_frames={7, 21}, duplicate_frames=True)
        await cluster.add_worker(f"w{number}", behaviour, ASCII_TOKENS)
    await cluster.add_router()
    await cluster.ready()
    answers = await asyncio.gather(
        *(post_stream(http, cluster.url + COMPLETIONS, body(seed)) for seed in range(200))
    )
    assert [events.text for events in answers] == [expected(seed) for seed in range(200)]
    await undisturbed(cluster)
