"""Workers become a pipeline while they serve: tokens stay the same, nothing leaks, memory grows."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.worker.engine.request import Request, RequestStatus
from services.worker.kernels.cpu import CpuKernels
from services.worker.links.base import Transport
from shared.messages import FinishReason
from tests.tiny_models import NUM_LAYERS, VOCAB_SIZE, TinyModels
from tests.unit.model.model_helpers import random_tokens
from tests.unit.model.request_helpers import make_request
from tests.unit.pipeline.pipeline_engine import make_requests, undisturbed
from tests.unit.pipeline.pipeline_helpers import add, expect, open_cluster


@pytest.fixture(params=["llama", "qwen2-tied", "phi3-window"])
def directory(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Path:
    return tiny_models.directory(request.param)


@pytest.mark.parametrize("transport", Transport)
def test_a_pipeline_gives_the_tokens_of_a_replica(
    directory: Path, kernels: CpuKernels, transport: Transport
) -> None:
    expected = undisturbed(directory, kernels, make_requests(8))
    with open_cluster(directory, kernels, transport=transport) as cluster:
        cluster.change(range(len(cluster.engines)))
        add(cluster, make_requests(8))
        cluster.run()
        expect(cluster, expected)
        cluster.check()


@pytest.mark.parametrize("transport", Transport)  # KV is read out of memory, or sent
@pytest.mark.parametrize(
    ("name", "num_workers"), [("llama", 2), ("qwen2-tied", 2), ("phi3-window", 3), ("llama", 4)]
)
def test_streams_live_through_a_drop(
    tiny_models: TinyModels, kernels: CpuKernels, name: str, num_workers: int, transport: Transport
) -> None:
    """Their homes are all the workers of the group."""
    directory = tiny_models.directory(name)
    expected = undisturbed(directory, kernels, make_requests(9))
    with open_cluster(directory, kernels, num_workers, transport, num_tokens=24) as cluster:
        requests = make_requests(9)
        for position in range(num_workers):
            add(cluster, requests[position::num_workers], at=position)
        cluster.run(lambda: len(cluster.tokens("r0")) >= 5)
        blocks_before = [engine.runner.num_blocks for engine in cluster.engines]
        cluster.change(range(len(cluster.engines)))
        cluster.run()
        expect(cluster, expected)
        cluster.check()
        assert cluster.has_settled()
        for engine, before in zip(cluster.engines, blocks_before, strict=True):
            assert engine.runner.num_blocks > before * NUM_LAYERS / len(engine.runner.span)


@pytest.mark.parametrize("home", [0, 1])
def test_a_drop_in_mid_prefill(tiny_models: TinyModels, kernels: CpuKernels, home: int) -> None:
    directory = tiny_models.directory("llama")

    def request() -> Request:
        return make_request("long", random_tokens(100, 1, VOCAB_SIZE), max_tokens=12)

    expected = undisturbed(directory, kernels, [request()])
    with open_cluster(directory, kernels) as cluster:
        prefilling = request()
        add(cluster, [prefilling], at=home)
        cluster.run(lambda: prefilling.num_computed_tokens > 40)
        assert prefilling.num_computed_tokens < 99
        cluster.change(range(len(cluster.engines)))
        cluster.run()
        expect(cluster, expected)
        cluster.check()


def test_a_drop_brings_the_promised_blocks_at_once(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    with open_cluster(tiny_models.directory("llama"), kernels) as cluster:
        before = cluster.leader.runner.num_blocks
        cluster.change(range(len(cluster.engines)))
        cluster.run(lambda: cluster.leader.core.load().kv_blocks_total > before)


def test_a_cancelled_stream_frees_every_stage(tiny_models: TinyModels, kernels: CpuKernels) -> None:
    with open_cluster(tiny_models.directory("llama"), kernels) as cluster:
        cluster.change(range(len(cluster.engines)))
        add(cluster, make_requests(4, max_tokens=100))
        cluster.run(lambda: all(cluster.tokens(f"r{index}") for index in range(4)))
        for index in range(4):
            cluster.leader.core.cancel(f"r{index}", 0)
        cluster.run()
        cluster.check()


@pytest.mark.parametrize("home", [0, 1, 2])
def test_cancels_while_kv_travels_leak_nothing(
    tiny_models: TinyModels, kernels: CpuKernels, home: int
) -> None:
    with open_cluster(tiny_models.directory("llama"), kernels, num_workers=3) as cluster:
        add(cluster, make_requests(6, max_tokens=60), at=home)
        cluster.run(lambda: all(cluster.tokens(f"r{index}") for index in range(6)))
        cluster.change(range(len(cluster.engines)))
        cluster.run(
            lambda: any(
                request.status is RequestStatus.EXCHANGING
                for request in cluster.leader.scheduler.requests.values()
            )
        )
        for index in range(6):
            cluster.leader.core.cancel(f"r{index}", 0)
        cluster.run()
        cluster.check()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_batch_that_fails_on_a_stage_fails_its_requests_and_no_others(
    tiny_models: TinyModels,
    kernels: CpuKernels,
    monkeypatch: pytest.MonkeyPatch,
    failing: int,
) -> None:
    expected = undisturbed(tiny_models.directory("llama"), kernels, make_requests(3))
    with open_cluster(tiny_models.directory("llama"), kernels, num_workers=3) as cluster:
        cluster.change(range(len(cluster.engines)))
        add(cluster, make_requests(1))
        cluster.run(lambda: cluster.leader.of("r0"))
        with monkeypatch.context() as patch:
            patch.setattr(cluster.engines[failing].runner, "forward", _out_of_memory)
            cluster.run(lambda: cluster.leader.of("r0")[-1].finish_reason is FinishReason.ERROR)
        assert "no memory for that" in cluster.leader.of("r0")[-1].error
        add(cluster, make_requests(3)[1:])
        cluster.run()
        expect(cluster, {name: expected[name] for name in ("r1", "r2")})
        cluster.check()


def _out_of_memory(*_: object) -> None:
    raise MemoryError("no memory for that")
