"""Drops, exchanges and restores whose tensors travel as between GPUs; tokens stay the same.

Rings are small: parts of KV and weights often find no free slot and come later.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch

from services.worker.channels.base import ChannelKind, Direction
from services.worker.engine.request import Request, RequestStatus
from services.worker.kernels.cpu import CpuKernels
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.links.base import LinkDownError
from services.worker.pipeline.events import Broken, Phase, PhaseTimed, Whole
from services.worker.pipeline.peers import GroupPeers
from shared.layout import Span
from shared.messages import FinishReason
from tests.conftest import DEADLINE_SECONDS
from tests.tiny_models import NUM_LAYERS, TinyModels
from tests.torch_ops import TorchOps
from tests.unit.pipeline.devices import Devices
from tests.unit.pipeline.pipeline_engine import make_requests, undisturbed
from tests.unit.pipeline.pipeline_helpers import Cluster, add, expect, open_cluster

WHOLE = (Span(start=0, end=NUM_LAYERS),)


@pytest.fixture(params=[ChannelKind.CUDA_IPC, ChannelKind.NCCL])
def devices(request: pytest.FixtureRequest) -> Iterator[Devices]:
    """Nothing of them may be left at the end."""
    devices = Devices(request.param)
    yield devices
    ends_at = time.monotonic() + DEADLINE_SECONDS
    while not devices.are_idle:
        assert time.monotonic() < ends_at
        time.sleep(0.01)


def traffic(cluster: Cluster) -> Counter[tuple[ChannelKind, Direction]]:
    """Of all links there ever were."""
    total: Counter[tuple[ChannelKind, Direction]] = Counter()
    for link in cluster.links:
        total.update(link.channel.traffic())
    return total


def run_in_turns(cluster: Cluster, requests: Sequence[Request]) -> None:
    """Streams of all workers live through a drop, an exchange and a restore."""
    num = len(cluster.engines)
    for position in range(num):
        add(cluster, list(requests[position::num]), at=position)
    cluster.run(lambda: len(cluster.tokens("r0")) >= 5)
    cluster.regroup(range(num))
    cluster.change(*([position] for position in range(num)))
    cluster.run()


@pytest.mark.parametrize(("name", "num_workers"), [("llama", 2), ("qwen2-tied", 3)])
def test_streams_live_through_a_drop_and_a_restore(
    tiny_models: TinyModels, kernels: CpuKernels, devices: Devices, name: str, num_workers: int
) -> None:
    directory = tiny_models.directory(name)
    expected = undisturbed(directory, kernels, make_requests(8, 60))
    with open_cluster(directory, kernels, num_workers, devices=devices) as cluster:
        run_in_turns(cluster, make_requests(8, 60))
        expect(cluster, expected)
        cluster.check()
        sent = traffic(cluster)
        assert sent[devices.kind, Direction.SENT] > 0
        assert sent[ChannelKind.HOST, Direction.SENT] == 0  # there was a slot for each batch
        for engine in cluster.engines:
            assert engine.runner.resident_layers == WHOLE
            phases = {event.phase for event in engine.events if isinstance(event, PhaseTimed)}
            assert Phase.LOAD_PEER in phases


def test_the_layers_of_a_gpu_worker_do_the_same(tiny_models: TinyModels, devices: Devices) -> None:
    """In plain torch, which gives the same tokens, if not the same bits, in any batch."""
    kernels = TorchKernels(torch.device("cpu"), torch.float32, TorchOps())
    directory, greedy = tiny_models.directory("llama"), [0, 4]

    def requests() -> list[Request]:
        return [make_requests(8, 40)[number] for number in greedy]

    expected = undisturbed(directory, kernels, requests())
    with open_cluster(directory, kernels, 2, devices=devices) as cluster:
        run_in_turns(cluster, requests())
        expect(cluster, expected)
        cluster.check()


def is_exchanging(cluster: Cluster) -> bool:
    requests = cluster.leader.scheduler.requests.values()
    return any(request.status is RequestStatus.EXCHANGING for request in requests)


@pytest.mark.parametrize("home", [0, 1, 2])
def test_cancels_while_kv_travels_leak_nothing(
    tiny_models: TinyModels, kernels: CpuKernels, devices: Devices, home: int
) -> None:
    directory = tiny_models.directory("llama")
    with open_cluster(directory, kernels, 3, devices=devices) as cluster:
        add(cluster, make_requests(6, max_tokens=60), at=home)
        cluster.run(lambda: all(cluster.tokens(f"r{index}") for index in range(6)))
        cluster.change(range(3))
        cluster.run(lambda: is_exchanging(cluster))
        for index in range(0, 6, 2):
            cluster.leader.core.cancel(f"r{index}", 0)
        cluster.run()
        cluster.check()
        expected = undisturbed(directory, kernels, make_requests(6, 60)[1::2])
        expect(cluster, expected)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_survivors_of_a_dead_member_serve_again(
    tiny_models: TinyModels, kernels: CpuKernels, devices: Devices, victim: int
) -> None:
    directory = tiny_models.directory("llama")
    expected = undisturbed(directory, kernels, make_requests(3))
    with open_cluster(directory, kernels, 3, devices=devices) as cluster:
        requests = make_requests(9, 90)
        for position in range(3):
            add(cluster, requests[position::3], at=position)
        cluster.run(lambda: all(cluster.tokens(f"r{index}") for index in range(9)))
        cluster.change(range(3))
        cluster.run(lambda: is_exchanging(cluster))
        dead = cluster.engines.pop(victim)
        dead.member.close()
        survivors = cluster.engines
        cluster.run(lambda: all(each.event(Broken) and each.event(Whole) for each in survivors))
        for engine in survivors:
            ends = [item for item in engine.items if item.finish_reason is not None]
            assert {end.finish_reason for end in ends} <= {FinishReason.LOST}
            assert engine.runner.resident_layers == WHOLE
            engine.items.clear()
        cluster.check()
        add(cluster, make_requests(3))
        cluster.run(lambda: not survivors[0].core.has_work)
        expect(Cluster([survivors[0]]), expected)


def no_tensor(*_: object) -> None:
    raise LinkDownError("the channel was aborted")


@pytest.mark.parametrize("is_received", [True, False])
def test_a_batch_that_a_dead_member_had_part_in_is_not_answered(
    tiny_models: TinyModels,
    kernels: CpuKernels,
    devices: Devices,
    monkeypatch: pytest.MonkeyPatch,
    is_received: bool,
) -> None:
    """Neither with tokens, which may be garbage, nor with an error: it will be replayed."""
    with open_cluster(tiny_models.directory("llama"), kernels, devices=devices) as cluster:
        cluster.change(range(2))
        add(cluster, make_requests(2, 90))
        cluster.run(lambda: all(cluster.tokens(name) for name in ("r0", "r1")))
        if is_received:
            monkeypatch.setattr(GroupPeers, "is_connected", False)
        else:
            monkeypatch.setattr(GroupPeers, "received", no_tensor)
        counts = []
        for _ in range(40):
            counts.append(len(cluster.leader.items))
            for engine in cluster.engines:
                engine.turn()
        assert len(cluster.leader.items) == counts[10]  # what was on its way has come by then
        assert not any(item.error for item in cluster.leader.items)


def test_a_batch_too_large_for_a_slot_goes_through_the_host(
    tiny_models: TinyModels, kernels: CpuKernels, devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.unit.pipeline.devices.ACTIVATION_SLOT_BYTES", 512)
    directory = tiny_models.directory("llama")
    expected = undisturbed(directory, kernels, make_requests(6))
    with open_cluster(directory, kernels, 2, devices=devices) as cluster:
        cluster.change(range(2))
        add(cluster, make_requests(6))
        cluster.run()
        expect(cluster, expected)
        sent = traffic(cluster)
        assert sent[ChannelKind.HOST, Direction.SENT] > 0  # prompts
        assert sent[devices.kind, Direction.SENT] > 0  # a token or two
        cluster.check()
