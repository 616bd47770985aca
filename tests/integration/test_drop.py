"""Layers are dropped and restored while answers stream: clients read what they would have read.

Two workers on links of a few MB/s, so that KV is on its way for long enough to see it. Every test
proves that what it is about did happen: bytes were exchanged, requests waited or were preempted,
`/cluster` said so. Streams are of all kinds; what arrives is compared with an undisturbed run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
import pytest_asyncio

from tests.conftest import eventually
from tests.integration.clients import (
    ANSWER_SECONDS,
    Streams,
    Undisturbed,
    chat,
    completion,
)
from tests.integration.harness import Cluster
from tests.integration.layouts import Operator

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_MODEL_LEN = 2048
#: Of a worker; some hundred blocks, which few long requests fill.
SETTINGS = {
    "KUNSERVE_DEVICE_MEMORY": "4MiB",
    "KUNSERVE_CHUNK_BYTES": "64KiB",
    "KUNSERVE_MAX_MODEL_LEN": str(MAX_MODEL_LEN),
    "KUNSERVE_MAX_NUM_BATCHED_TOKENS": "32",
    "KUNSERVE_LINK_BANDWIDTH": "3MB",
}
WORDS = "the quick brown fox jumps over the lazy dog, "
#: Tokens of streams that outlive everything that happens in a test; then their clients go away.
ENDLESS = 700
#: So many tokens have arrived everywhere when something happens, and more after it.
SOME = 10
MOST_TRIES = 12

STREAMS: list[dict[str, Any]] = [
    completion(0, ENDLESS),
    chat(1, ENDLESS),
    chat(2, ENDLESS, logprobs=True, top_logprobs=3),
    completion(3, ENDLESS, repetition_penalty=1.2, frequency_penalty=0.4),
    completion(4, ENDLESS, presence_penalty=0.7, logit_bias={"101": -5.0}),
    completion(5, ENDLESS, top_p=0.9, top_k=40, logprobs=2),
    chat(6, ENDLESS, prompt=WORDS * 12),
    completion(7, ENDLESS, min_p=0.05, prompt=WORDS * 8),
]
#: They end by themselves, in several ways.
SHORT: list[dict[str, Any]] = [
    *(completion(number, 240) for number in range(20, 38)),
    completion(38, 240, stop=["a", "eo"], min_tokens=60),
    chat(39, 240, stop="th", min_tokens=80, logprobs=True),
    completion(40, 240, stop_token_ids=[101, 116], min_tokens=100),
    completion(41, 240, ignore_eos=False, prompt=WORDS * 4),
]
#: Much KV from the beginning.
LARGE = [completion(number, 300, prompt=f"{number}: {WORDS * 22}") for number in range(50, 56)]
#: A prompt that takes many batches.
PROMPT = completion(60, 40, prompt=WORDS * 43)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_settings: Mapping[str, str]
) -> AsyncIterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    async with Cluster(directory, workers=2, settings={**tiny_settings, **SETTINGS}) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(cluster: Cluster) -> Undisturbed:
    undisturbed = Undisturbed()
    streams = (STREAMS[:3], STREAMS[3:6], STREAMS[6:])
    for bodies in (*streams, SHORT[:11], SHORT[11:], LARGE[:2], LARGE[2:4], LARGE[4:], [PROMPT]):
        await undisturbed.ask(cluster.url, bodies)
    assert await Operator(cluster).num_preemptions() == 0
    return undisturbed


@pytest_asyncio.fixture(loop_scope="module")
async def operator(cluster: Cluster, undisturbed: Undisturbed) -> AsyncIterator[Operator]:
    """Of the idle cluster, all replicas; whatever a test does, it leaves nothing behind."""
    operator = Operator(cluster)
    yield operator
    await operator.check()
    await operator.make_whole()
    await operator.check()


# --- what streams live through -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "changes"),
    [
        ([], ["drop"]),
        (["drop"], ["restore"]),
        ([], ["drop", "restore", "drop"]),
        (["drop"], ["restore", "drop", "restore"]),
    ],
    ids=lambda changes: "-".join(changes) or "whole",
)
async def test_streams_live_through(
    cluster: Cluster,
    operator: Operator,
    undisturbed: Undisturbed,
    before: list[str],
    changes: list[str],
) -> None:
    for change in before:
        await operator.carry_out(change)
    async with Streams(cluster.urls, STREAMS) as streams:
        for change in changes:
            await streams.wait_more(SOME)
            assert not all(stream.is_over for stream in streams.streams)
            exchanged = await operator.exchanged_bytes()
            await operator.carry_out(change)
            assert await operator.exchanged_bytes() > exchanged
        await streams.wait_more(SOME)
        undisturbed.check(streams)


async def test_a_drop_in_the_middle_of_a_prompt(
    cluster: Cluster, operator: Operator, undisturbed: Undisturbed
) -> None:
    """Some of the prompt's KV was exchanged, but not all of it. A drop may miss that moment."""
    num_blocks = -(-len(PROMPT["prompt"]) // 16)
    whole_bytes = num_blocks * await operator.kv_block_bytes() // 2
    for _ in range(MOST_TRIES):
        before = await operator.exchanged_bytes()
        async with Streams(cluster.urls, [PROMPT]) as streams:
            await operator.carry_out("drop")
            exchanged_bytes = await operator.exchanged_bytes() - before
            await undisturbed.check_ends(streams)
        if 0 < exchanged_bytes < whole_bytes:
            return
        await operator.carry_out("restore")
    pytest.fail(f"no drop came in the middle of the prompt, in {MOST_TRIES} tries")


async def test_requests_that_wait_when_layers_are_dropped(
    cluster: Cluster, operator: Operator, undisturbed: Undisturbed
) -> None:
    async with Streams(cluster.urls, LARGE) as holding, Streams(cluster.urls, SHORT) as streams:
        await operator.wait_load("requests_waiting", 1)
        await operator.carry_out("drop")
        await holding.wait_more(1)
        undisturbed.check(holding)
        await holding.disconnect()
        await undisturbed.check_ends(streams)


async def test_preemptions_while_layers_are_dropped(
    cluster: Cluster, operator: Operator, undisturbed: Undisturbed
) -> None:
    await operator.carry_out("drop")
    before = await operator.num_preemptions()

    async def has_preempted() -> bool:
        return await operator.num_preemptions() > before

    async with Streams(cluster.urls, [*STREAMS, *LARGE]) as streams:
        await eventually(has_preempted, ANSWER_SECONDS)
        await streams.wait_more(1)
        undisturbed.check(streams)


async def test_clients_that_leave_during_the_exchange(
    cluster: Cluster, operator: Operator, undisturbed: Undisturbed
) -> None:
    """Most KV belongs to them; those who stay read on."""
    async with (
        Streams(cluster.urls, STREAMS) as staying,
        Streams(cluster.urls, LARGE[:4]) as leaving,
    ):
        await leaving.wait_more(1)
        await staying.wait_more(SOME)
        plan = await operator.order("drop")
        await operator.wait_exchanging(num_members=2)
        await leaving.disconnect()
        await operator.wait_settled(plan["epoch"])
        await staying.wait_more(SOME)
        undisturbed.check(staying)
        undisturbed.check(leaving)


async def test_more_kv_than_replicas_hold_when_layers_are_restored(
    cluster: Cluster, operator: Operator, undisturbed: Undisturbed
) -> None:
    capacity = sum(group["kv_blocks_total"] for group in await operator.groups())
    await operator.carry_out("drop")
    async with Streams(cluster.urls, [*STREAMS, *LARGE]) as streams:
        await operator.wait_load("kv_blocks_used", capacity + 1)
        before = await operator.num_preemptions()
        await operator.carry_out("restore")
        assert await operator.num_preemptions() > before
        await streams.wait_more(1)
        undisturbed.check(streams)
