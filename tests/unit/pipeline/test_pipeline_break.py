"""A member of a pipeline is gone: survivors lose what they must, become whole again and serve."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from services.worker.engine.request import RequestStatus
from services.worker.kernels.cpu import CpuKernels
from services.worker.pipeline.events import (
    Broken,
    Committed,
    FormerLost,
    PrepareFailed,
    Settled,
    Whole,
)
from shared.layout import Span
from shared.messages import FinishReason
from tests.tiny_models import NUM_LAYERS, TinyModels
from tests.unit.pipeline.pipeline_engine import Engine, make_requests, undisturbed
from tests.unit.pipeline.pipeline_helpers import Cluster, add, expect, open_cluster

WHOLE = (Span(start=0, end=NUM_LAYERS),)
#: So long that none ends before something happens.
NUM_TOKENS = 90


def drop(cluster: Cluster) -> None:
    cluster.regroup(range(len(cluster.engines)))


def begin_drop(cluster: Cluster) -> None:
    cluster.change(range(len(cluster.engines)))


def one_commits(cluster: Cluster) -> None:
    """All but the last member have committed."""
    cluster.prepare(range(len(cluster.engines)))
    cluster.run(lambda: all(engine.events for engine in cluster.engines))
    cluster.commit(cluster.engines[:-1])
    cluster.run(lambda: cluster.leader.event(Committed))


def exchange(cluster: Cluster) -> None:
    begin_drop(cluster)
    requests = cluster.leader.scheduler.requests
    cluster.run(lambda: any(r.status is RequestStatus.EXCHANGING for r in requests.values()))


def prepare_restore(cluster: Cluster) -> None:
    drop(cluster)
    cluster.prepare(*([position] for position in range(len(cluster.engines))))
    for _ in range(5):
        for engine in cluster.engines:
            engine.turn()


MOMENTS = (begin_drop, exchange, drop, prepare_restore)


def kill(cluster: Cluster, victim: Engine) -> list[Engine]:
    """Close all links of `victim` and turn it no more; returns the others."""
    cluster.engines.remove(victim)
    victim.member.close()
    return cluster.engines


def is_whole(engine: Engine) -> bool:
    return engine.event(Whole) and engine.event(Broken)


def assert_lost(engine: Engine, request_ids: set[str]) -> None:
    """All these ended as lost, and whatever was on its way from others; each once."""
    ends = [item for item in engine.items if item.finish_reason is not None]
    assert {item.request_id for item in ends} >= request_ids
    assert len({item.request_id for item in ends}) == len(ends)
    for end in ends:
        assert (end.finish_reason, end.index, end.token_ids) == (FinishReason.LOST, 0, ())


@pytest.mark.parametrize(("moment", "victim"), [*product(MOMENTS, [0, 1, 2]), (one_commits, 2)])
def test_survivors_lose_their_requests_and_become_replicas(
    tiny_models: TinyModels,
    kernels: CpuKernels,
    moment: Callable[[Cluster], None],
    victim: int,
) -> None:
    directory = tiny_models.directory("llama")
    expected = undisturbed(directory, kernels, make_requests(3))
    with open_cluster(directory, kernels, 3) as cluster:
        blocks = cluster.leader.runner.num_blocks
        requests = make_requests(9, NUM_TOKENS)
        for position in range(3):
            add(cluster, requests[position::3], at=position)
        cluster.run(lambda: all(cluster.tokens(f"r{index}") for index in range(9)))
        leader = cluster.leader
        moment(cluster)
        running = {key.request_id for key in leader.scheduler.requests}
        survivors = kill(cluster, cluster.engines[victim])
        cluster.run(lambda: all(is_whole(engine) for engine in survivors))
        if leader in survivors:
            assert running
            assert_lost(leader, running)
        for engine in survivors:
            assert engine.runner.resident_layers == WHOLE
            assert engine.runner.num_blocks == blocks
            assert engine.core.load().kv_blocks_total == blocks
            assert not engine.scheduler.requests
        cluster.check()
        for engine in survivors:
            engine.items.clear()
        for number, engine in enumerate(survivors):
            add(cluster, make_requests(3), at=number)
            cluster.run(lambda engine=engine: not engine.core.has_work)
            expect(Cluster([engine]), expected)
        cluster.check()


def test_the_plan_ends_a_group_at_once(tiny_models: TinyModels, kernels: CpuKernels) -> None:
    with open_cluster(tiny_models.directory("llama"), kernels) as cluster:
        drop(cluster)
        add(cluster, make_requests(4, NUM_TOKENS))
        cluster.run(lambda: all(cluster.tokens(f"r{index}") for index in range(4)))
        leader, follower = cluster.engines
        leader.items += leader.member.break_up("the plan has ended the group")
        leader.items += leader.member.break_up("the plan has ended the group")
        cluster.run(lambda: is_whole(leader) and is_whole(follower))
        assert_lost(leader, {f"r{index}" for index in range(4)})
        cluster.check()


def test_requests_that_come_while_layers_are_loaded_wait(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    """They were accepted for the group a moment before it broke."""
    directory = tiny_models.directory("llama")
    expected = undisturbed(directory, kernels, make_requests(2))
    with open_cluster(directory, kernels) as cluster:
        drop(cluster)
        leader, follower = cluster.engines
        kill(cluster, follower)
        cluster.run(lambda: leader.event(Broken))
        add(cluster, make_requests(2))
        cluster.run()
        expect(cluster, expected)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_replica_goes_on_without_the_pipeline_that_requests_still_leave(
    tiny_models: TinyModels, kernels: CpuKernels, victim: int
) -> None:
    directory = tiny_models.directory("llama")
    later = make_requests(6, NUM_TOKENS)[4:]
    expected = undisturbed(directory, kernels, make_requests(6, NUM_TOKENS)[4:])
    with open_cluster(directory, kernels) as cluster:
        add(cluster, make_requests(4, NUM_TOKENS))
        drop(cluster)
        cluster.change([0], [1])
        cluster.run(lambda: all(engine.event(Committed) for engine in cluster.engines))
        (survivor,) = set(map(id, cluster.engines)) - {id(cluster.engines[victim])}
        staying = next(engine for engine in cluster.engines if id(engine) == survivor)
        assert staying.core.add(later[0]) == staying.core.add(later[1]) == []
        kill(cluster, cluster.engines[victim])
        cluster.run(lambda: staying.event(FormerLost) and staying.event(Settled))
        cluster.run()
        expect(cluster, expected)
        assert not staying.event(Broken)
        cluster.check()


def test_a_commit_whose_peer_is_gone_gives_nothing_up(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    """The peer dies between the worker's word that it is prepared and the commit."""
    with open_cluster(tiny_models.directory("llama"), kernels) as cluster:
        cluster.prepare(range(2))
        cluster.run(lambda: all(engine.events for engine in cluster.engines))
        leader, follower = cluster.engines
        kill(cluster, follower)
        cluster.run(lambda: leader.event(PrepareFailed))
        cluster.commit()
        cluster.run(lambda: is_whole(leader))
        assert not leader.event(Committed)
        cluster.check()
