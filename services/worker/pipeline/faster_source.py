"""Chooses between the checkpoint and another worker for each arena, by what each has done so far.

first arena: checkpoint    second: peer    from then on: the faster one of the last of each

A rate is bytes by seconds from the begin of an arena to its end, with all that the worker did in
between: what counts is when the layers are back. A peer that fails once is not asked again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import structlog

from services.worker.model.arena_source import ArenaSource
from services.worker.model.plan import ArenaPlan
from services.worker.pipeline.events import EventSink, Phase, PhaseTimed
from services.worker.pipeline.weight_courier import WeightsNotGivenError


@dataclass(slots=True)
class _Done:
    """What a source has done."""

    num_bytes: int = 0
    seconds: float = 0.0
    last_rate: float | None = None  # bytes per second of the last arena

    def add(self, num_bytes: int, seconds: float) -> None:
        self.num_bytes += num_bytes
        self.seconds += seconds
        self.last_rate = num_bytes / max(seconds, 1e-9)


class PeerSource(ArenaSource, Protocol):
    """Other workers; `WeightCourier` is one. `fill` may raise WeightsNotGivenError."""

    def has(self, arena_name: str) -> bool:
        """True if one of them should have the arena."""
        ...


class FasterSource:
    """An `ArenaSource` for one restore."""

    def __init__(
        self,
        checkpoint: ArenaSource,
        peer: PeerSource,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._checkpoint = checkpoint
        self._peer = peer
        self._done = {Phase.LOAD_CHECKPOINT: _Done(), Phase.LOAD_PEER: _Done()}
        self._asks_peer = True
        self._log = structlog.get_logger(component="restore")

    def fill(self, arena: ArenaPlan, address: int) -> Iterator[int]:
        """Fill an arena from the source that is faster now, from the other where that fails.

        Raises:
            CheckpointError: a tensor cannot be read.
        """
        if self._peer_is_next and self._peer.has(arena.name):
            try:
                yield from self._timed(Phase.LOAD_PEER, self._peer.fill(arena, address))
                return
            except WeightsNotGivenError as error:
                self._asks_peer = False
                self._log.warning("weights come from the checkpoint alone", reason=str(error))
        yield from self._timed(Phase.LOAD_CHECKPOINT, self._checkpoint.fill(arena, address))

    def report(self, emit: EventSink) -> None:
        """Tell how much came from where, and how fast."""
        for phase, done in self._done.items():
            if done.num_bytes:
                emit(PhaseTimed(phase, done.seconds, done.num_bytes))

    @property
    def _peer_is_next(self) -> bool:
        checkpoint = self._done[Phase.LOAD_CHECKPOINT].last_rate
        peer = self._done[Phase.LOAD_PEER].last_rate
        if not self._asks_peer or checkpoint is None:
            return False
        return peer is None or peer > checkpoint

    def _timed(self, phase: Phase, pieces: Iterator[int]) -> Iterator[int]:
        began_at, num_bytes = self._clock(), 0
        for piece_bytes in pieces:
            num_bytes += piece_bytes
            yield piece_bytes
        self._done[phase].add(num_bytes, self._clock() - began_at)
