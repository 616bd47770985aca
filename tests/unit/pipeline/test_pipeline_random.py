"""Random ways through layouts of two to four workers, with requests that come, go and live on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.worker.kernels.cpu import CpuKernels
from services.worker.links.base import Transport
from services.worker.pipeline.events import Prepared
from tests.tiny_models import NUM_LAYERS, TinyModels
from tests.unit.pipeline.pipeline_engine import make_requests, undisturbed
from tests.unit.pipeline.pipeline_helpers import Cluster, add, open_cluster

NUM_REQUESTS = 12
NUM_TOKENS = 60


@dataclass(frozen=True)
class Regroup:
    """Go to another layout; or get ready for it and stay."""

    groups: tuple[tuple[int, ...], ...]
    cuts: tuple[tuple[int, ...], ...]
    is_called_off: bool


@dataclass(frozen=True)
class Turn:
    """Let everybody work for a while."""

    num_turns: int


@dataclass(frozen=True)
class Add:
    """A client asks some group."""

    group: int


@dataclass(frozen=True)
class Cancel:
    """A client goes away."""

    request: int


@st.composite
def regroupings(draw: st.DrawFn, num_workers: int) -> Regroup:
    """Any partition of the workers in any order, with any layers."""
    order = draw(st.permutations(range(num_workers)))
    ends = sorted(draw(st.sets(st.integers(1, num_workers - 1))))
    bounds = [0, *ends, num_workers]
    groups = [tuple(order[a:b]) for a, b in itertools.pairwise(bounds)]
    inner = st.integers(1, NUM_LAYERS - 1)
    cuts = [draw(st.sets(inner, min_size=len(g) - 1, max_size=len(g) - 1)) for g in groups]
    return Regroup(
        tuple(groups),
        tuple(tuple(sorted(layers)) for layers in cuts),
        is_called_off=draw(st.integers(0, 5)) == 0,
    )


@st.composite
def scripts(draw: st.DrawFn) -> tuple[int, list[object]]:
    """A number of workers, and what happens."""
    num_workers = draw(st.integers(2, 4))
    step = st.one_of(
        regroupings(num_workers),
        st.builds(Turn, st.integers(1, 30)),
        st.builds(Add, st.integers(0, 3)),
        st.builds(Add, st.integers(0, 3)),
        st.builds(Cancel, st.integers(0, NUM_REQUESTS - 1)),
    )
    return num_workers, draw(st.lists(step, min_size=8, max_size=25))


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=scripts(), transport=st.sampled_from(Transport))
@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
def test_tokens_stay_the_same_on_any_way_through_layouts(
    tiny_models: TinyModels,
    kernels: CpuKernels,
    script: tuple[int, list[object]],
    transport: Transport,
    late: bool,
) -> None:
    """Also with a device that computes by itself: nobody moves what a batch in flight needs."""
    directory = tiny_models.directory("llama")
    num_workers, steps = script
    with open_cluster(directory, kernels, num_workers, transport, late=late) as cluster:
        cancelled = play(cluster, steps)
        cluster.run()
        cluster.check()
        for request_id, expected in expectations(directory, kernels).items():
            tokens = cluster.tokens(request_id)
            assert tokens == expected[: len(tokens)], request_id
            if tokens and request_id not in cancelled:
                assert len(tokens) == len(expected), request_id


@cache
def expectations(directory: Path, kernels: CpuKernels) -> dict[str, list[int]]:
    """What each request brings, undisturbed."""
    return undisturbed(directory, kernels, make_requests(NUM_REQUESTS, NUM_TOKENS))


def play(cluster: Cluster, steps: Sequence[object]) -> set[str]:
    """Do what the script says; returns the requests that were cancelled."""
    waiting = make_requests(NUM_REQUESTS, NUM_TOKENS)
    cancelled: set[str] = set()
    for step in steps:
        match step:
            case Regroup():
                _regroup(cluster, step)
            case Turn(num_turns):
                for _ in range(num_turns):
                    for engine in cluster.engines:
                        engine.turn()
            case Add(group) if waiting:
                groups = cluster.plan.groups
                leader = groups[group % len(groups)].leader
                add(cluster, [waiting.pop(0)], at=int(leader[1:]))
            case Cancel(request):
                cancelled.add(f"r{request}")
                for engine in cluster.engines:
                    engine.core.cancel(f"r{request}", 0)
        cluster.check_integrity()
    return cancelled


def _regroup(cluster: Cluster, step: Regroup) -> None:
    if not cluster.has_settled():
        cluster.run(cluster.has_settled)
    if not step.is_called_off:
        cluster.change(*step.groups, cuts=step.cuts)
        return
    cluster.prepare(*step.groups, cuts=step.cuts)
    preparing = [engine for engine in cluster.engines if engine.is_preparing]
    cluster.run(lambda: all(engine.event(Prepared) for engine in preparing))
    cluster.call_off()
