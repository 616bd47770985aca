"""Weights on their way from a member that has a layer to one that loads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import pytest
import torch

from services.worker.channels.base import ChannelKind
from services.worker.kernels.cpu import CpuKernels
from services.worker.links.base import Link
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.device_mark import IsPast
from services.worker.pipeline.peers import GroupPeers
from services.worker.pipeline.weight_courier import WeightCourier, WeightsNotGivenError
from shared.layout import Span
from tests.tiny_models import NUM_LAYERS, TinyModels
from tests.unit.model.model_helpers import open_runner
from tests.unit.pipeline.devices import Devices
from tests.unit.pipeline.pipeline_engine import memory_of
from tests.unit.pipeline.pipeline_helpers import make_group
from tests.unit.pipeline.wire import Wire

NAMES = ("asker", "giver")
FRONT, BACK = Span(start=0, end=NUM_LAYERS // 2), Span(start=NUM_LAYERS // 2, end=NUM_LAYERS)


@dataclass
class Pair:
    """The asker loads the layers that the giver serves; the giver has all of them."""

    runners: list[ModelRunner]
    wires: list[Wire]
    couriers: list[WeightCourier]

    @property
    def reads_memory(self) -> bool:
        return self.wires[0].peer_memory is not None

    def load(self, most_rounds: int = 10_000) -> None:
        """Let weights travel until all are here, or for some rounds, and then no more."""
        asker, _ = self.runners
        asker.keep(FRONT)
        asker.shrink(asker.blocks_with(BACK), ())
        pieces = asker.load_missing(BACK, self.couriers[0])
        for _ in zip(range(most_rounds), pieces, strict=False):
            self.turn()
        pieces.close()  # type: ignore[attr-defined]

    def turn(self) -> None:
        """The giver gives, and all that was sent arrives."""
        self.couriers[1].pump()
        for wire, courier in zip(self.wires, reversed(self.couriers), strict=True):
            while wire.sent:
                courier.handle(wire.sent.popleft())

    def has_same_weights(self) -> bool:
        asker, giver = (runner.stage for runner in self.runners)
        for name in giver.arena_names(BACK):
            here, there = asker.arena_bytes(name), giver.arena_bytes(name)
            if here is None or there is None or not torch.equal(here, there):
                return False
        return True


@pytest.fixture(params=["read", *ChannelKind])
def pair(
    request: pytest.FixtureRequest, tiny_models: TinyModels, kernels: CpuKernels
) -> Iterator[Pair]:
    directory, reads_memory = tiny_models.directory("llama"), request.param == "read"
    devices = Devices(ChannelKind.HOST if reads_memory else request.param)
    with ExitStack() as stack:
        runners = [stack.enter_context(open_runner(directory, kernels)) for _ in NAMES]
        memories = [memory_of(runner) if reads_memory else None for runner in reversed(runners)]
        wires = list(map(Wire, memories, devices.channels(*NAMES)))
        others = zip(NAMES, reversed(NAMES), wires, runners, strict=True)
        couriers = [
            WeightCourier(GroupPeers(own, make_group(NAMES), {other: cast(Link, wire)}), runner)
            for own, other, wire, runner in others
        ]
        yield Pair(runners, wires, couriers)


def test_layers_arrive_as_they_were(pair: Pair) -> None:
    pair.load()
    assert pair.has_same_weights()


def test_a_layer_is_there_when_the_device_has_written_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[bool] = []

    def mark(device: torch.device) -> IsPast:
        moments = iter([False, False, True])

        def is_past() -> bool:
            looks.append(next(moments))
            return looks[-1]

        return is_past

    monkeypatch.setattr("services.worker.pipeline.weight_courier.mark", mark)
    pair.load()
    num_arenas = len(pair.runners[1].stage.arena_names(BACK))
    assert looks == ([] if pair.reads_memory else [False, False, True] * num_arenas)


def test_layers_of_a_giver_that_is_gone_are_not_there(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bytes may be garbage that the device went on with."""
    if pair.reads_memory:
        pytest.skip("what is read is there")

    def mark(device: torch.device) -> IsPast:
        pair.wires[0].is_up = False
        return lambda: True

    monkeypatch.setattr("services.worker.pipeline.weight_courier.mark", mark)
    with pytest.raises(WeightsNotGivenError, match="giver is gone"):
        pair.load()
    assert not pair.has_same_weights()


def test_what_comes_after_a_load_was_called_off_makes_room_for_the_next(pair: Pair) -> None:
    for most_rounds in (1, 2, 3, 1, 2, 3):
        pair.load(most_rounds)
        pair.couriers[1].pump()
    pair.load()
    assert pair.has_same_weights()
