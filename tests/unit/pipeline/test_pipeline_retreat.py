"""A drop of full workers: what KV has left behind makes room for KV that still has to come."""

from __future__ import annotations

from itertools import product

import pytest

from services.worker.engine.request import Request
from services.worker.kernels.cpu import CpuKernels
from services.worker.links.base import Transport
from services.worker.pipeline.retreat import retreat
from shared.layout import Span
from tests.tiny_models import NUM_LAYERS, VOCAB_SIZE, TinyModels
from tests.unit.model.model_helpers import random_tokens
from tests.unit.model.request_helpers import make_request
from tests.unit.pipeline.pipeline_engine import make_requests, undisturbed
from tests.unit.pipeline.pipeline_helpers import Cluster, add, expect, open_cluster

MEMORY_BYTES = 2 * 2**20  # 88 blocks for a replica, of which a drop adds less than half
NUM_REQUESTS = 11  # of each worker: more than the blocks that are there before any KV has left


def filling(num: int) -> list[Request]:
    return [
        make_request(
            f"r{index}", random_tokens(90, index, VOCAB_SIZE), max_tokens=30, ignore_eos=True
        )
        for index in range(num)
    ]


def fill(cluster: Cluster, requests: list[Request]) -> None:
    """Serve them on all workers, in turn, until all run."""
    num = len(cluster.engines)
    for position in range(num):
        add(cluster, requests[position::num], at=position)
    cluster.run(lambda: all(cluster.tokens(request.request_id) for request in requests))


@pytest.mark.parametrize("transport", Transport)  # KV is read out of memory, or sent
@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_all_kv_travels_although_it_does_not_fit_at_once(
    tiny_models: TinyModels, kernels: CpuKernels, name: str, transport: Transport
) -> None:
    directory = tiny_models.directory(name)
    expected = undisturbed(directory, kernels, filling(2 * NUM_REQUESTS))
    with open_cluster(
        directory, kernels, transport=transport, memory_bytes=MEMORY_BYTES, num_tokens=256
    ) as cluster:
        requests = filling(2 * NUM_REQUESTS)
        fill(cluster, requests)
        cluster.change([0, 1])
        cluster.run(cluster.has_settled)
        assert all(cluster.is_running(request.request_id) for request in requests)
        assert sum(engine.core.load().num_preemptions for engine in cluster.engines) == 0
        cluster.check_integrity()
        cluster.run()
        expect(cluster, expected)
        cluster.check()


def test_requests_that_arrive_meanwhile_do_not_mix_with_kv_that_stays(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    directory = tiny_models.directory("llama")
    expected = undisturbed(directory, kernels, [*filling(2 * NUM_REQUESTS), *late()])
    with open_cluster(directory, kernels, memory_bytes=MEMORY_BYTES, num_tokens=256) as cluster:
        fill(cluster, filling(2 * NUM_REQUESTS))
        cluster.change([0, 1])
        add(cluster, late())
        cluster.run()
        expect(cluster, expected)
        cluster.check()


def late() -> list[Request]:
    requests = make_requests(4)
    for request in requests:
        request.request_id += "-late"
    return requests


def test_blocks_taken_since_the_last_retreat_are_only_in_layers_served(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    """A request that is about to travel has a block for its next token, too, wherever one is."""
    directory = tiny_models.directory("llama")
    with open_cluster(directory, kernels, num_workers=1, memory_bytes=MEMORY_BYTES) as cluster:
        (engine,) = cluster.engines
        runner, scheduler = engine.runner, engine.scheduler
        size, route = runner.block_size, scheduler.relocation.route
        gone, stays, other = (
            make_request(name, random_tokens(8, 0, VOCAB_SIZE)) for name in ("gone", "stays", "o")
        )
        for request in (gone, stays, other):
            scheduler.add(request)

        def take(request: Request, num_blocks: int) -> None:
            assert scheduler.blocks.allocate(request, route, num_blocks * size)

        take(gone, runner.num_blocks - 2)
        take(stays, 2)
        for layer, block in product(range(NUM_LAYERS), stays.block_table):
            runner.kv_cache(layer)[block].fill_(layer + 1)
        scheduler.blocks.grow(runner.keep(Span(start=0, end=2)))
        scheduler.blocks.free(gone)
        retreat(runner, scheduler, [stays])
        take(other, scheduler.blocks.num_free(engine.worker_id) - 1)
        take(stays, 3)
        high = stays.block_table[2]
        assert high >= runner.pool.num_kv_blocks([3])
        runner.kv_cache(0)[high].fill_(9.0)
        retreat(runner, scheduler, [stays])
        assert sorted(stays.block_table) == [0, 1, 2]
        for layer, block in product(range(NUM_LAYERS), stays.block_table[:2]):
            assert (runner.kv_cache(layer)[block] == layer + 1).all()
        assert (runner.kv_cache(0)[stays.block_table[2]] == 9.0).all()
