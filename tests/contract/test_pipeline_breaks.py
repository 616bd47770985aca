"""Pipelines that end at once: what routers are told, and how the workers go on."""

from __future__ import annotations

from shared.layout import LayoutState, PlanPhase, Span
from shared.messages import Drain, FinishReason, Resume, ResumeReply, TokenItem
from tests.conftest import eventually
from tests.pipeline_support import (
    NUM_TOKENS,
    PIPELINE,
    REPLY_SECONDS,
    SAMPLINGS,
    SUBJECTS,
    WORKERS,
    Client,
    make_group,
    running_cluster,
)
from tests.tiny_models import NUM_LAYERS, TinyModels

LEADER, FOLLOWER = WORKERS


def lost(client: Client, name: str) -> list[TokenItem]:
    return [item for item in client.of(name) if item.finish_reason is FinishReason.LOST]


async def pipeline_with_streams(client: Client) -> None:
    """One stream that began at the follower, one at the leader, one at the pipeline."""
    for worker_id in WORKERS:
        await client.generate(worker_id, worker_id, f"g-{worker_id}", max_tokens=220)
        await eventually(lambda name=worker_id: client.of(name))
    await client.drop()
    await client.generate("later", LEADER, PIPELINE, max_tokens=220)
    await eventually(lambda: client.of("later"))


async def test_a_plan_that_ends_a_pipeline_at_once(tiny_models: TinyModels) -> None:
    """Its requests are lost, its workers get their layers back, and then they are replicas."""
    async with running_cluster(tiny_models.directory("llama")) as client:
        await pipeline_with_streams(client)
        await client.be_replicas()
        for name in (*WORKERS, "later"):
            await eventually(lambda name=name: lost(client, name))
            for item in lost(client, name):
                assert (item.index, item.token_ids, item.error) == (0, (), "")
        for worker_id in WORKERS:
            info = await client.info(worker_id)
            assert info.layers == (Span(start=0, end=NUM_LAYERS),)
            name = f"end{worker_id[-1]}"
            await client.generate(name, worker_id, f"g-{worker_id}", **SAMPLINGS["seeded"])
            assert len(await client.tokens(name)) == NUM_TOKENS
        await eventually(client.is_idle)
        await client.drop()
        await client.settled()


async def test_what_a_follower_gave_away_is_lost_by_its_own_word(tiny_models: TinyModels) -> None:
    """The leader may be dead before any router knows that it serves the stream."""
    async with running_cluster(tiny_models.directory("llama")) as client:
        await pipeline_with_streams(client)
        await client.be_replicas()
        await eventually(lambda: len(lost(client, FOLLOWER)) == 2)
        assert FOLLOWER in client.speakers[FOLLOWER]
        num_words = len(client.of(FOLLOWER))
        resume = Resume(request_id=FOLLOWER, attempt=0, num_received=3)
        answer = await client.bus.request(
            SUBJECTS.control(FOLLOWER), resume.encode(), timeout_seconds=REPLY_SECONDS
        )
        assert ResumeReply.decode(answer).known
        await eventually(lambda: len(client.of(FOLLOWER)) > num_words)
        assert client.of(FOLLOWER)[-1].finish_reason is FinishReason.LOST


async def test_a_worker_that_drains_joins_no_pipeline(tiny_models: TinyModels) -> None:
    async with running_cluster(tiny_models.directory("llama")) as client:
        await client.generate("a", FOLLOWER, f"g-{FOLLOWER}", **SAMPLINGS["seeded"])
        drain = Drain().encode()
        await client.bus.request(SUBJECTS.control(FOLLOWER), drain, timeout_seconds=REPLY_SECONDS)
        assert client.plan is not None
        group = make_group(PIPELINE, list(WORKERS), client.plan.epoch + 1)
        await client.publish([group], LayoutState.DROPPING, PlanPhase.PREPARE, change=True)

        await eventually(lambda: client.is_refused_by(FOLLOWER))
        await client.be_replicas()
        assert len(await client.tokens("a")) == NUM_TOKENS
