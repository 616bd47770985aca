"""Layouts change, and stages answer, while devices compute by themselves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from services.worker.engine.request import Request
from services.worker.kernels.cpu import CpuKernels
from services.worker.pipeline.events import Committed, Prepared
from shared.messages import FinishReason
from tests.late_model import LateTokens, delay_samples
from tests.tiny_models import TinyModels
from tests.unit.pipeline.pipeline_engine import make_requests, undisturbed
from tests.unit.pipeline.pipeline_helpers import Cluster, add, expect, open_cluster

NEVER = 1_000_000


@contextmanager
def serving_replicas(
    tiny_models: TinyModels, kernels: CpuKernels, requests: list[Request]
) -> Iterator[Cluster]:
    """Two replicas, each with requests half way and a batch that is being computed."""
    with open_cluster(tiny_models.directory("llama"), kernels, late=True) as cluster:
        for home in (0, 1):
            add(cluster, requests[home::2], at=home)
        cluster.run(
            lambda: (
                all(cluster.tokens(request.request_id) for request in requests)
                and all(engine.core.is_computing for engine in cluster.engines)
            )
        )
        yield cluster


def test_streams_live_through_a_drop_and_a_restore(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    requests = make_requests(8, max_tokens=50)
    expected = undisturbed(tiny_models.directory("llama"), kernels, make_requests(8, max_tokens=50))
    with serving_replicas(tiny_models, kernels, requests) as cluster:
        cluster.regroup(range(2))
        assert cluster.leader.core.has_work
        cluster.regroup([0], [1])
        cluster.run()
        expect(cluster, expected)
        cluster.check()


def test_a_replica_commits_when_nothing_is_computed_any_more(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    with serving_replicas(tiny_models, kernels, make_requests(4, max_tokens=50)) as cluster:
        cluster.prepare(range(2))
        for engine in cluster.engines:
            assert any(isinstance(e, Prepared) for e in engine.member.take_events())
            assert engine.core.is_computing
            weights = engine.runner.pool.usage.weight_bytes
            engine.member.commit()
            engine.member.pump(0.0)
            assert not any(isinstance(e, Committed) for e in engine.member.take_events())
            assert engine.runner.pool.usage.weight_bytes == weights
            engine.items += engine.core.step(0.0)
            assert not engine.core.is_computing
            engine.member.pump(0.0)
            assert engine.runner.pool.usage.weight_bytes < weights
            engine.is_preparing = False
        cluster.leader.core.lose_all()


@contextmanager
def pipeline_with_slow_answers(
    tiny_models: TinyModels, kernels: CpuKernels
) -> Iterator[tuple[Cluster, list[LateTokens]]]:
    """Two stages, and two batches whose tokens the last one does not have yet."""
    with open_cluster(tiny_models.directory("llama"), kernels) as cluster:
        cluster.regroup(range(2))
        leader, follower = cluster.engines
        pending: list[LateTokens] = []
        delay_samples(follower.runner, lambda: NEVER)
        sample = follower.runner.sample

        def recorded(*arguments: object) -> LateTokens:
            pending.append(sample(*arguments))  # type: ignore[arg-type]
            return pending[-1]

        follower.runner.sample = recorded  # type: ignore[method-assign, assignment]
        for request in make_requests(2):
            add(cluster, [request])
            leader.turn()
        cluster.run(lambda: len(pending) == 2)
        yield cluster, pending


def test_the_last_stage_takes_a_batch_while_another_ones_tokens_are_computed(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    with pipeline_with_slow_answers(tiny_models, kernels) as (cluster, pending):
        leader, follower = cluster.engines
        assert follower.member.owes_answers
        assert not leader.member.owes_answers
        pending[1].num_looks = 0
        for _ in range(20):
            follower.turn()
            time.sleep(0.001)
            leader.turn()
        assert leader.items == []  # the older one comes first
        pending[0].num_looks = 0
        follower.turn()
        assert not follower.member.owes_answers
        cluster.run(lambda: len(leader.items) == 2)
        assert [item.request_id for item in leader.items] == ["r0", "r1"]
        leader.core.lose_all()


def test_tokens_that_cannot_be_computed_fail_their_batch_and_no_other(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    with pipeline_with_slow_answers(tiny_models, kernels) as (cluster, pending):
        leader = cluster.leader
        pending[0].error = RuntimeError("the device is gone")
        for each in pending:
            each.num_looks = 0
        cluster.run(lambda: all(leader.of(f"r{index}") for index in range(2)))
        (failed,), (token,) = leader.of("r0"), leader.of("r1")
        assert failed.finish_reason is FinishReason.ERROR
        assert "w1: the device is gone" in failed.error
        assert len(token.token_ids) == 1
        leader.core.lose_all()
