"""From any layout to any other while streams live on: tokens stay the same, nothing leaks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from services.worker.engine.request import Request
from services.worker.kernels.cpu import CpuKernels
from shared.layout import Span
from tests.tiny_models import NUM_LAYERS, TinyModels
from tests.unit.pipeline.pipeline_helpers import (
    Cluster,
    add,
    expect,
    make_requests,
    open_cluster,
    undisturbed,
)

WHOLE = (Span(start=0, end=NUM_LAYERS),)
ALONE = ([0], [1], [2], [3])
PAIRS = ([0, 1], [2, 3])
FOUR = ([0, 2, 1, 3],)
Layout = Sequence[Sequence[int]]


def spans(cluster: Cluster) -> list[tuple[Span, ...]]:
    return [engine.runner.resident_layers for engine in cluster.engines]


def visit(cluster: Cluster, layouts: Sequence[Layout], requests: Sequence[Request]) -> None:
    """Go through layouts, the first of which is there; whoever leads in one gets requests then."""
    share = -(-len(requests) // len(layouts))
    for position, (layout, following) in enumerate(pairwise([*layouts, layouts[-1]])):
        mine = requests[position * share : (position + 1) * share]
        for number, request in enumerate(mine):
            add(cluster, [request], at=layout[number % len(layout)][0])
        if mine:
            cluster.run(lambda mine=mine: all(r.num_output_tokens > 1 for r in mine))
        if following is not layout:
            cluster.regroup(*following)
            for engine in cluster.engines:
                engine.core.check_integrity()
                engine.runner.pool.check_integrity()
    cluster.run()
    cluster.check()


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "phi3-window"])
def test_streams_live_through_two_drops_and_two_restores(
    tiny_models: TinyModels, kernels: CpuKernels, name: str
) -> None:
    directory = tiny_models.directory(name)
    expected = undisturbed(directory, kernels, make_requests(20, 60))
    with open_cluster(directory, kernels, 4) as cluster:
        blocks = [engine.runner.num_blocks for engine in cluster.engines]
        visit(cluster, [ALONE, PAIRS, FOUR, PAIRS, ALONE], make_requests(20, 60))
        expect(cluster, expected)
        assert spans(cluster) == [WHOLE] * 4
        assert [engine.runner.num_blocks for engine in cluster.engines] == blocks
        assert [engine.core.load().kv_blocks_total for engine in cluster.engines] == blocks
