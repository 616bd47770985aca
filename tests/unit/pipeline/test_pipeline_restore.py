"""A pipeline becomes replicas again while it serves: tokens stay the same, memory comes back."""

from __future__ import annotations

import pytest

from services.worker.engine.request import Request
from services.worker.kernels.cpu import CpuKernels
from services.worker.links.base import Transport
from services.worker.pipeline.events import Phase, PhaseTimed, Prepared
from shared.layout import Span
from tests.tiny_models import NUM_LAYERS, TinyModels
from tests.unit.pipeline.pipeline_engine import make_requests, undisturbed
from tests.unit.pipeline.pipeline_helpers import add, expect, open_cluster

WHOLE = (Span(start=0, end=NUM_LAYERS),)


@pytest.mark.parametrize("transport", Transport)  # weights and KV are read, or sent
@pytest.mark.parametrize(
    ("name", "num_workers"), [("llama", 2), ("qwen2-tied", 2), ("phi3-window", 3)]
)
def test_streams_live_through_a_restore(
    tiny_models: TinyModels, kernels: CpuKernels, name: str, num_workers: int, transport: Transport
) -> None:
    directory = tiny_models.directory(name)
    expected = undisturbed(directory, kernels, make_requests(10, 60))
    with open_cluster(directory, kernels, num_workers, transport) as cluster:
        blocks = [engine.runner.num_blocks for engine in cluster.engines]
        requests = make_requests(10, 60)
        add(cluster, requests[:5])
        cluster.regroup(range(len(cluster.engines)))
        cluster.change(*([position] for position in range(len(cluster.engines))))
        add(cluster, requests[5:], at=1)
        cluster.run()
        expect(cluster, expected)
        cluster.check()
        assert [engine.runner.resident_layers for engine in cluster.engines] == [
            WHOLE
        ] * num_workers
        assert [engine.runner.num_blocks for engine in cluster.engines] == blocks
        for engine in cluster.engines:  # both sources are tried, and give the same weights
            phases = {event.phase for event in engine.events if isinstance(event, PhaseTimed)}
            assert {Phase.LOAD_CHECKPOINT, Phase.LOAD_PEER} <= phases
        assert [engine.core.load().kv_blocks_total for engine in cluster.engines] == blocks


def test_a_restore_that_is_called_off_leaves_the_pipeline(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    directory = tiny_models.directory("llama")
    expected = undisturbed(directory, kernels, make_requests(6, 60))
    with open_cluster(directory, kernels) as cluster:
        add(cluster, make_requests(6, 60))
        cluster.regroup(range(len(cluster.engines)))
        blocks = cluster.leader.runner.num_blocks
        cluster.run(lambda: cluster.leader.core.load().kv_blocks_total == blocks)
        cluster.prepare([0], [1])
        cluster.run(lambda: all(engine.event(Prepared) for engine in cluster.engines))
        assert cluster.leader.core.load().kv_blocks_total < blocks
        cluster.call_off()
        cluster.run(lambda: cluster.leader.core.load().kv_blocks_total == blocks)
        cluster.run()
        expect(cluster, expected)
        cluster.check()


def test_requests_that_a_replica_cannot_hold_compute_again(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    """More KV than a replica has is in use when the restore begins."""
    directory = tiny_models.directory("llama")

    def requests() -> list[Request]:
        return make_requests(16, 90)

    expected = undisturbed(directory, kernels, requests())
    with open_cluster(directory, kernels, memory_bytes=1024 * 1024) as cluster:
        replica_blocks = cluster.leader.runner.num_blocks
        add(cluster, requests())
        cluster.regroup(range(len(cluster.engines)))
        cluster.run(lambda: cluster.leader.core.load().kv_blocks_used > replica_blocks)
        cluster.change(*([position] for position in range(len(cluster.engines))))
        cluster.run()
        expect(cluster, expected)
        cluster.check()
        assert cluster.leader.core.load().num_preemptions > 0
