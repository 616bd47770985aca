"""Four real workers on one bus go through layouts as plans say, while they stream."""

from __future__ import annotations

from shared.layout import LayoutState, Span
from tests.conftest import eventually
from tests.pipeline_support import NUM_TOKENS, SAMPLINGS, running_cluster
from tests.tiny_models import NUM_LAYERS, TinyModels

A, B, C, D = WORKERS = ("worker-a", "worker-b", "worker-c", "worker-d")
PAIRS = ((A, B), (C, D))
FOUR = (A, C, B, D)


async def test_pairs_then_four_then_pairs_then_replicas(tiny_models: TinyModels) -> None:
    """Streams begin in every layout, on whoever leads then; all tell what they would have told."""
    model = tiny_models.directory("llama")
    dispatches = [
        ("a1", A, "g-worker-a"),
        ("c1", C, "g-worker-c"),
        ("d1", D, "g-worker-d"),
        ("a2", A, "p-worker-a"),
        ("c2", C, "p-worker-c"),
        ("a3", A, "p-worker-a"),
        ("a4", A, "p-worker-a"),
        ("c4", C, "p-worker-c"),
    ]
    async with running_cluster(model, (A,)) as client:
        for name, _, _ in dispatches:
            await client.generate(name, A, "g-worker-a", **SAMPLINGS["seeded"])
        undisturbed = {name: await client.tokens(name) for name, _, _ in dispatches}
    async with running_cluster(model, WORKERS) as client:
        steps = [
            (dispatches[:3], LayoutState.DROPPING, PAIRS),
            (dispatches[3:5], LayoutState.DROPPING, (FOUR,)),
            (dispatches[5:6], LayoutState.RESTORING, PAIRS),
            (dispatches[6:], LayoutState.RESTORING, tuple((worker,) for worker in WORKERS)),
        ]
        for requests, state, groups in steps:
            for name, worker_id, group_id in requests:
                await client.generate(name, worker_id, group_id, **SAMPLINGS["seeded"])
            names = [name for name, _, _ in requests]
            await eventually(lambda names=names: all(client.of(name) for name in names))
            await client.regroup(state, *groups)
        for name, tokens in undisturbed.items():
            assert await client.tokens(name) == tokens, name
        await eventually(client.is_idle)
        for worker_id in WORKERS:
            assert (await client.info(worker_id)).layers == (Span(start=0, end=NUM_LAYERS),)
            name = f"end{worker_id[-1]}"
            await client.generate(name, worker_id, f"g-{worker_id}")
            assert len(await client.tokens(name)) == NUM_TOKENS
