"""Each arena comes from the source that was faster last; one that fails is not asked again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from services.worker.kernels.cpu import CpuKernels
from services.worker.model.arena import ArenaLayout
from services.worker.model.plan import ArenaPlan
from services.worker.pipeline.events import GroupEvent, Phase, PhaseTimed
from services.worker.pipeline.faster_source import FasterSource
from services.worker.pipeline.weight_courier import WeightsNotGivenError


@dataclass
class Clock:
    """Goes on when a source works."""

    now: float = 0.0


@dataclass
class Source:
    """Gives arenas of 100 bytes in two pieces, or nothing."""

    name: str
    clock: Clock
    calls: list[str]
    piece_seconds: float = 0.01
    fails: bool = False
    missing: set[str] = field(default_factory=set)

    def has(self, arena_name: str) -> bool:
        return arena_name not in self.missing

    def fill(self, arena: ArenaPlan, address: int) -> Iterator[int]:
        self.calls.append(f"{self.name} {arena.name}")
        for _ in range(2):
            yield 0
            if self.fails:
                raise WeightsNotGivenError("it has gone")
            self.clock.now += self.piece_seconds
            yield 50


def load(kernels: CpuKernels, checkpoint: Source, peer: Source, num_arenas: int) -> FasterSource:
    source = FasterSource(checkpoint, peer, lambda: checkpoint.clock.now)
    for number in range(num_arenas):
        arena = ArenaPlan(f"layer.{number}", ArenaLayout([], kernels), "")
        assert sum(source.fill(arena, 0)) == 100
    return source


def test_both_are_tried_and_the_faster_one_goes_on(kernels: CpuKernels) -> None:
    for slow, fast in (("checkpoint", "peer"), ("peer", "checkpoint")):
        calls: list[str] = []
        clock = Clock()
        sources = {slow: Source(slow, clock, calls, 0.05), fast: Source(fast, clock, calls)}
        load(kernels, sources["checkpoint"], sources["peer"], 4)
        assert calls[:2] == ["checkpoint layer.0", "peer layer.1"]
        assert calls[2:] == [f"{fast} layer.2", f"{fast} layer.3"]


def test_a_peer_that_fails_is_asked_once_and_the_checkpoint_fills_in(kernels: CpuKernels) -> None:
    calls: list[str] = []
    clock = Clock()
    peer = Source("peer", clock, calls, fails=True)
    load(kernels, Source("checkpoint", clock, calls), peer, 3)
    checkpoint_only = [f"checkpoint layer.{number}" for number in range(3)]
    assert calls == [checkpoint_only[0], "peer layer.1", *checkpoint_only[1:]]


def test_what_the_peers_do_not_have_comes_from_the_checkpoint(kernels: CpuKernels) -> None:
    calls: list[str] = []
    clock = Clock()
    peer = Source("peer", clock, calls, missing={"layer.1"})
    load(kernels, Source("checkpoint", clock, calls), peer, 3)
    assert calls == ["checkpoint layer.0", "checkpoint layer.1", "peer layer.2"]


def test_the_report_adds_up(kernels: CpuKernels) -> None:
    events: list[GroupEvent] = []
    clock = Clock()
    sources = Source("checkpoint", clock, []), Source("peer", clock, [])
    load(kernels, *sources, 3).report(events.append)
    timed = [event for event in events if isinstance(event, PhaseTimed)]
    assert {event.phase for event in timed} == {Phase.LOAD_CHECKPOINT, Phase.LOAD_PEER}
    assert sum(event.num_bytes for event in timed) == 300
