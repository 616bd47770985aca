"""From any layout to any other while streams live on: tokens stay the same, nothing leaks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from services.worker.engine.request import Request, RequestStatus
from services.worker.kernels.cpu import CpuKernels
from services.worker.pipeline.events import Prepared
from shared.layout import Span
from tests.tiny_models import NUM_LAYERS, VOCAB_SIZE, TinyModels
from tests.unit.model.model_helpers import random_tokens
from tests.unit.model.request_helpers import make_request
from tests.unit.pipeline.pipeline_engine import make_requests, undisturbed
from tests.unit.pipeline.pipeline_helpers import Cluster, add, expect, open_cluster

WHOLE = (Span(start=0, end=NUM_LAYERS),)
ALONE = ([0], [1], [2], [3])
PAIRS = ([0, 1], [2, 3])
FOUR = ([0, 2, 1, 3],)
Layout = Sequence[Sequence[int]]


def visit(cluster: Cluster, layouts: Sequence[Layout], requests: Sequence[Request]) -> None:
    """Go through layouts, the first of which is there; whoever leads in one gets requests then.

    Some requests live through all of them.
    """
    share = -(-len(requests) // len(layouts))
    for position, (layout, following) in enumerate(pairwise([*layouts, layouts[-1]])):
        mine = requests[position * share : (position + 1) * share]
        for number, request in enumerate(mine):
            add(cluster, [request], at=layout[number % len(layout)][0])
        if following is layout:
            break
        cluster.run(lambda mine=mine: all(r.num_output_tokens > 1 for r in mine))
        cluster.regroup(*following)
        cluster.check_integrity()
    assert any(cluster.is_running(request.request_id) for request in requests[:share])
    cluster.run()
    cluster.check()


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_streams_live_through_two_drops_and_two_restores(
    tiny_models: TinyModels, kernels: CpuKernels, name: str
) -> None:
    directory = tiny_models.directory(name)
    expected = undisturbed(directory, kernels, make_requests(20, 100))
    with open_cluster(directory, kernels, 4) as cluster:
        blocks = [engine.runner.num_blocks for engine in cluster.engines]
        visit(cluster, [ALONE, PAIRS, FOUR, PAIRS, ALONE], make_requests(20, 100))
        expect(cluster, expected)
        assert cluster.resident_layers() == [WHOLE] * 4
        assert [engine.runner.num_blocks for engine in cluster.engines] == blocks
        assert [engine.core.load().kv_blocks_total for engine in cluster.engines] == blocks


@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param([([0], [1], [2]), ([0, 1], [2]), ([0, 1, 2],)], id="one by one"),
        pytest.param([([0], [1], [2]), ([0, 1, 2],), ([0, 2], [1])], id="half back"),
        pytest.param([ALONE, FOUR, ([0, 1], [2], [3]), FOUR, ALONE], id="there and back"),
        pytest.param([([0], [1]), ([0, 1],), ([1, 0],)], id="places changed"),
        pytest.param([([0], [1], [2]), ([0, 1, 2],), ([1, 2], [0])], id="layers changed"),
        pytest.param([ALONE, PAIRS, ([3, 0, 2, 1],), ALONE], id="another leader"),
        pytest.param([ALONE, FOUR, ([3, 0], [1], [2])], id="leader follows some of them"),
    ],
)
def test_any_layout_follows_any_other(
    tiny_models: TinyModels, kernels: CpuKernels, layouts: Sequence[Layout]
) -> None:
    """Also where members must get layers and give up others at the same time."""
    directory = tiny_models.directory("llama")
    expected = undisturbed(directory, kernels, make_requests(12, 100))
    num_workers = sum(map(len, layouts[0]))
    with open_cluster(directory, kernels, num_workers) as cluster:
        visit(cluster, layouts, make_requests(12, 100))
        expect(cluster, expected)


@pytest.mark.parametrize(("home", "target"), [(0, FOUR), (2, FOUR)])
def test_a_second_drop_in_mid_prefill(
    tiny_models: TinyModels, kernels: CpuKernels, home: int, target: Layout
) -> None:
    directory = tiny_models.directory("llama")

    def request() -> Request:
        return make_request("long", random_tokens(110, 1, VOCAB_SIZE), max_tokens=12)

    expected = undisturbed(directory, kernels, [request()])
    with open_cluster(directory, kernels, 4, num_tokens=16) as cluster:
        cluster.regroup(*PAIRS)
        prefilling = request()
        add(cluster, [prefilling], at=home)
        cluster.run(lambda: prefilling.num_computed_tokens > 40)
        assert prefilling.num_computed_tokens < 109
        cluster.change(*target)
        cluster.run()
        expect(cluster, expected)
        cluster.check()


@pytest.mark.parametrize(("before", "after"), [(PAIRS, FOUR), (FOUR, PAIRS), (FOUR, ALONE)])
def test_cancels_while_kv_travels_leak_nothing(
    tiny_models: TinyModels, kernels: CpuKernels, before: Layout, after: Layout
) -> None:
    with open_cluster(tiny_models.directory("llama"), kernels, num_workers=4) as cluster:
        cluster.regroup(*before)
        names = [f"r{index}" for index in range(8)]
        for number, request in enumerate(make_requests(8, max_tokens=100)):
            add(cluster, [request], at=before[number % len(before)][0])
        cluster.run(lambda: all(cluster.tokens(name) for name in names))
        cluster.change(*after)
        cluster.run(
            lambda: any(
                request.status is RequestStatus.EXCHANGING
                for engine in cluster.engines
                for request in engine.scheduler.requests.values()
            )
        )
        for name in names[::2]:
            for engine in cluster.engines:
                engine.core.cancel(name, 0)
        cluster.run()
        cluster.check()


def test_requests_that_nobody_wants_are_not_taken_over(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    """Their clients go away while they are handed over; the stages of both leaders are freed."""
    with open_cluster(tiny_models.directory("llama"), kernels, num_workers=4) as cluster:
        cluster.regroup(*PAIRS)
        names = {f"r{index}" for index in range(4)}
        add(cluster, make_requests(4, max_tokens=100), at=2)
        cluster.run(lambda: all(cluster.tokens(name) for name in names))
        cluster.engines[2].unwanted = names
        cluster.regroup(*FOUR)
        cluster.run()
        cluster.check()


def test_more_kv_than_fewer_layers_leave_room_for(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    """Requests are preempted while the layers are dropped, and when some come back."""
    directory = tiny_models.directory("llama")
    expected = undisturbed(directory, kernels, make_requests(24, 90))
    with open_cluster(directory, kernels, 4, memory_bytes=1024 * 1024) as cluster:
        cluster.regroup(*FOUR)
        add(cluster, make_requests(24, 90))
        half = cluster.leader.runner.num_blocks // 2
        cluster.run(lambda: cluster.leader.core.load().kv_blocks_used > half)
        cluster.regroup(*PAIRS)
        cluster.run()
        cluster.check()
        expect(cluster, expected)
        assert cluster.leader.core.load().num_preemptions > 0


@pytest.mark.parametrize("first", [[0], [1, 2], [3]])
def test_members_commit_in_any_order(
    tiny_models: TinyModels, kernels: CpuKernels, first: list[int]
) -> None:
    directory = tiny_models.directory("llama")
    expected = undisturbed(directory, kernels, make_requests(8, 60))
    with open_cluster(directory, kernels, 4) as cluster:
        cluster.regroup(*PAIRS)
        requests = make_requests(8, 60)
        add(cluster, requests[:4], at=0)
        add(cluster, requests[4:], at=2)
        cluster.run(lambda: all(request.num_output_tokens > 1 for request in requests))
        for layout in (FOUR, PAIRS):
            cluster.prepare(*layout)
            cluster.run(lambda: all(engine.event(Prepared) for engine in cluster.engines))
            cluster.commit([cluster.engines[position] for position in first])
            for _ in range(20):
                for engine in cluster.engines:
                    engine.turn()
            cluster.commit()
            cluster.run(cluster.has_settled)
        cluster.run()
        cluster.check()
        expect(cluster, expected)


def test_a_partial_restore_that_is_called_off_leaves_the_pipeline(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    directory = tiny_models.directory("llama")
    expected = undisturbed(directory, kernels, make_requests(6, 60))
    with open_cluster(directory, kernels, 4) as cluster:
        cluster.regroup(*FOUR)
        blocks, layers = cluster.leader.core.load().kv_blocks_total, cluster.resident_layers()
        add(cluster, make_requests(6, 60))
        cluster.prepare(*PAIRS)
        cluster.run(lambda: all(engine.event(Prepared) for engine in cluster.engines))
        assert cluster.resident_layers() != layers
        cluster.call_off()
        cluster.run(lambda: cluster.leader.core.load().kv_blocks_total == blocks)
        assert cluster.resident_layers() == layers
        cluster.run()
        expect(cluster, expected)
        cluster.regroup(*PAIRS)
        cluster.check()


@pytest.mark.parametrize("after", [PAIRS, ALONE])
def test_requests_that_wait_are_spread_when_a_pipeline_is_split(
    tiny_models: TinyModels, kernels: CpuKernels, after: Layout
) -> None:
    """Whoever leads next gets its share of them, and they lose nothing."""
    directory = tiny_models.directory("llama")
    expected = undisturbed(directory, kernels, make_requests(40, 60))
    with open_cluster(directory, kernels, 4, memory_bytes=1024 * 1024) as cluster:
        cluster.regroup(*FOUR)
        add(cluster, make_requests(40, 60))
        cluster.run(lambda: len(cluster.tokens("r0")) > 2)
        cluster.change(*after)
        cluster.run(cluster.has_settled)
        leaders = [cluster.engines[group[0]] for group in after]
        assert all(engine.core.has_work for engine in leaders)
        cluster.run()
        cluster.check()
        expect(cluster, expected)
