"""Two real workers on one bus, and a test that writes the plans: streams live through a drop."""

from __future__ import annotations

import pytest

from shared.layout import LayoutState, PlanPhase, Span
from shared.messages import (
    AckState,
    Cancel,
    Resume,
    ResumeReply,
)
from tests.conftest import eventually
from tests.pipeline_support import (
    NUM_TOKENS,
    PIPELINE,
    REPLY_SECONDS,
    SAMPLINGS,
    SUBJECTS,
    WORKERS,
    make_group,
    running_cluster,
    start_streams,
)
from tests.tiny_models import NUM_LAYERS, TinyModels


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
async def test_streams_live_through_a_drop(tiny_models: TinyModels, name: str) -> None:
    model = tiny_models.directory(name)
    async with running_cluster(model) as client:
        streams = await start_streams(client)
        undisturbed = {stream: await client.tokens(stream) for stream in streams}
    async with running_cluster(model) as client:
        blocks = {worker_id: report.kv_blocks_total for worker_id, report in client.loads.items()}
        await start_streams(client)
        await client.drop()
        await client.generate("later", WORKERS[0], PIPELINE, temperature=0.0)
        for stream, tokens in undisturbed.items():
            assert await client.tokens(stream) == tokens, stream
        await client.settled()
        assert len(await client.tokens("later")) == NUM_TOKENS
        moved = [stream for stream in streams if stream.startswith(WORKERS[1])]
        assert any(client.speakers[stream][-1] == WORKERS[0] for stream in moved)
        await eventually(client.is_idle)
        await eventually(lambda: client.loads[WORKERS[0]].kv_blocks_total > 2 * blocks[WORKERS[0]])
        assert [(await client.info(worker_id)).layers for worker_id in WORKERS] == [
            (Span(start=0, end=2),),
            (Span(start=2, end=4),),
        ]


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
async def test_streams_live_through_drops_and_restores(tiny_models: TinyModels, name: str) -> None:
    """Streams that begin in every phase, on whoever takes requests then."""
    model = tiny_models.directory(name)
    phases = [("first", 0, "g-worker-a"), ("second", 0, PIPELINE), ("third", 1, "g-worker-b")]
    async with running_cluster(model) as client:
        for stream, _, _ in phases:
            await client.generate(stream, WORKERS[0], "g-worker-a", **SAMPLINGS["seeded"])
        undisturbed = {stream: await client.tokens(stream) for stream, _, _ in phases}
    async with running_cluster(model) as client:
        changes = (client.drop, client.restore, client.drop)
        for (stream, worker, group_id), change in zip(phases, changes, strict=True):
            await client.generate(stream, WORKERS[worker], group_id, **SAMPLINGS["seeded"])
            await eventually(lambda stream=stream: client.of(stream))
            await change()
            await client.settled()
        for stream, tokens in undisturbed.items():
            assert await client.tokens(stream) == tokens, stream
        await client.restore()
        await client.settled()
        await eventually(client.is_idle)
        for worker_id in WORKERS:
            assert (await client.info(worker_id)).layers == (Span(start=0, end=NUM_LAYERS),)
            name = f"end{worker_id[-1]}"
            await client.generate(name, worker_id, f"g-{worker_id}")
            assert len(await client.tokens(name)) == NUM_TOKENS


async def test_a_restore_that_is_called_off_leaves_the_pipeline(tiny_models: TinyModels) -> None:
    async with running_cluster(tiny_models.directory("llama")) as client:
        await client.drop()
        await client.settled()
        assert client.plan is not None
        pipeline = client.plan.groups
        groups = [make_group(f"g-{worker_id}", [worker_id]) for worker_id in WORKERS]
        await client.publish(groups, LayoutState.RESTORING, PlanPhase.PREPARE, change=True)
        await client.publish(pipeline, LayoutState.DROPPED, PlanPhase.COMMIT, change=False)
        await client.settled()
        await client.generate("a", WORKERS[0], PIPELINE)
        assert len(await client.tokens("a")) == NUM_TOKENS
        await client.restore()
        await client.settled()


async def test_leases_and_load_reports_tell_what_is_held(tiny_models: TinyModels) -> None:
    async with running_cluster(tiny_models.directory("llama")) as client:
        whole = {worker_id: await client.info(worker_id) for worker_id in WORKERS}
        alone = {worker_id: client.loads[worker_id].kv_blocks_total for worker_id in WORKERS}

        async def lease_is(worker_id: str, layers: Span) -> bool:
            info = await client.info(worker_id)
            assert info.weight_bytes + info.kv_bytes + info.free_bytes == info.memory_bytes
            assert info.costs == whole[worker_id].costs
            assert info.costs is not None
            per_layer = info.costs.kv_layer_block_bytes
            assert info.kv_block_bytes == per_layer * sum(map(len, info.layers))
            return info.layers == (layers,)

        def reports(worker_id: str, group_id: str, num_blocks: int) -> bool:
            report = client.loads[worker_id]
            return (report.group_id, report.kv_blocks_total) == (group_id, num_blocks)

        await client.drop()
        await client.settled()
        blocks = []
        for worker_id, layers in zip(
            WORKERS, (Span(start=0, end=2), Span(start=2, end=4)), strict=True
        ):
            await eventually(lambda w=worker_id, s=layers: lease_is(w, s))  # type: ignore[misc]
            dropped = await client.info(worker_id)
            assert dropped.weight_bytes < whole[worker_id].weight_bytes
            assert dropped.kv_bytes > whole[worker_id].kv_bytes
            blocks.append(dropped.kv_bytes // dropped.kv_block_bytes)
        await eventually(lambda: reports(WORKERS[0], PIPELINE, min(blocks)))

        await client.restore()
        await client.settled()
        for worker_id in WORKERS:
            await eventually(lambda w=worker_id: lease_is(w, Span(start=0, end=NUM_LAYERS)))  # type: ignore[misc]
            again = await client.info(worker_id)
            for name in ("weight_bytes", "kv_bytes", "free_bytes", "kv_block_bytes"):
                assert getattr(again, name) == getattr(whole[worker_id], name)
            await eventually(lambda w=worker_id: reports(w, f"g-{w}", alone[w]))  # type: ignore[misc]


async def test_a_planner_that_takes_over_is_told_how_far_the_workers_are(
    tiny_models: TinyModels,
) -> None:
    async with running_cluster(tiny_models.directory("llama")) as client:
        await client.prepare()
        await client.take_over()
        await eventually(lambda: client.answered(AckState.PREPARED))
        await client.be_replicas()
        for change in (client.drop, client.restore):
            await change()
            await client.settled()
            await client.take_over()
            await client.settled()


async def test_what_still_reaches_the_follower_is_passed_on(tiny_models: TinyModels) -> None:
    async with running_cluster(tiny_models.directory("llama")) as client:
        for name in ("cancelled", "resumed"):
            await client.generate(name, WORKERS[1], "g-worker-b", max_tokens=200)
        await eventually(lambda: client.of("cancelled") and client.of("resumed"))
        await client.drop()
        await client.settled()
        cancel = Cancel(request_id="cancelled", attempt=0)
        await client.bus.publish(SUBJECTS.control(WORKERS[1]), cancel.encode())
        tokens = await client.tokens("resumed")
        client.items = [item for item in client.items if item.request_id != "resumed"]
        resume = Resume(request_id="resumed", attempt=0, num_received=3)
        answer = await client.bus.request(
            SUBJECTS.control(WORKERS[1]), resume.encode(), timeout_seconds=REPLY_SECONDS
        )
        assert ResumeReply.decode(answer).known
        await eventually(lambda: client.ended("resumed"))
        again = [token for item in client.of("resumed") for token in item.token_ids]
        assert again == tokens[3:]
        assert not client.ended("cancelled")
        await eventually(client.is_idle)


async def test_a_prepared_group_that_is_called_off_changes_nothing(tiny_models: TinyModels) -> None:
    async with running_cluster(tiny_models.directory("llama")) as client:
        await client.generate("a", WORKERS[1], "g-worker-b", **SAMPLINGS["seeded"])
        await client.prepare()
        await client.be_replicas()
        await client.generate("b", WORKERS[1], "g-worker-b", **SAMPLINGS["seeded"])
        assert len(await client.tokens("a")) == len(await client.tokens("b")) == NUM_TOKENS
        await client.drop()
        await client.settled()


async def test_a_commit_without_its_prepare_fails(tiny_models: TinyModels) -> None:
    async with running_cluster(tiny_models.directory("llama")) as client:
        group = make_group(PIPELINE, list(WORKERS), 2)
        await client.publish([group], LayoutState.DROPPING, PlanPhase.COMMIT, change=True)
        await eventually(lambda: client.answered(AckState.FAILED))
        await client.be_replicas()
        await client.generate("a", WORKERS[1], "g-worker-b")
        assert len(await client.tokens("a")) == NUM_TOKENS


async def test_a_member_that_cannot_be_reached_makes_the_other_refuse(
    tiny_models: TinyModels,
) -> None:
    async with running_cluster(tiny_models.directory("llama")) as client:
        assert client.plan is not None
        group = make_group(PIPELINE, ["worker-a", "nobody"], client.plan.epoch + 1)
        await client.publish([group], LayoutState.DROPPING, PlanPhase.PREPARE, change=True)

        await eventually(lambda: client.is_refused_by("worker-a"))
