"""A member gets layers that its next group needs while its pipeline serves. Engine thread.

SHRINKING  blocks that there is no room for beside those layers are given up, at a batch boundary
LOADING    their chunks become weights, piece by piece between two batches
LOADED     the layers have their weights and as many KV blocks as those that are served
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from enum import Enum, auto

from services.worker.engine.block_manager import BlockMove
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.events import EventSink, Phase, PhaseTimed, Prepared
from services.worker.pipeline.faster_source import FasterSource
from services.worker.pipeline.weight_courier import WeightCourier
from services.worker.work_pacer import WorkPacer
from shared.layout import Span

#: Share of the time that loading may take while batches run, besides bubbles.
_SHARE = 0.04


class RestorationState(Enum):
    """How far it is; only ever goes on."""

    SHRINKING = auto()
    LOADING = auto()
    LOADED = auto()


class Restoration:
    """One member's preparation for a group, until it is committed or called off.

    Attributes:
        epoch: of the plan that asks for it.
        num_blocks: what will be left.
    """

    def __init__(
        self,
        runner: ModelRunner,
        weights: WeightCourier,
        emit: EventSink,
        epoch: int,
        span: Span,
    ) -> None:
        """Begin to get `span`, from the checkpoint or by `weights`, whichever is faster."""
        self.epoch = epoch
        self.state = RestorationState.SHRINKING
        self.num_blocks = min(runner.num_blocks, runner.blocks_with(span))
        self._runner = runner
        self._emit = emit
        self._span = span
        self._source = FasterSource(runner.stage.checkpoint_source, weights)
        self._pieces: Iterator[int] = iter(())
        self._num_bytes = 0
        self._began_at = time.perf_counter()
        self._pacer = WorkPacer(self._began_at, _SHARE, runner.activity)

    def shrunk(self, moves: Sequence[BlockMove]) -> None:
        """Blocks that are left have the lowest numbers, after these moves."""
        self._runner.shrink(self.num_blocks, moves)
        self._pieces = self._runner.load_missing(self._span, self._source)
        self._began_at = time.perf_counter()
        self.state = RestorationState.LOADING

    @property
    def is_busy(self) -> bool:
        """True while `pump` has something to do."""
        return self.state is RestorationState.LOADING

    def pump(self) -> None:
        """Load for as long as it may take now."""
        if not self.is_busy:
            return
        now = time.perf_counter()
        ends_at = now + self._pacer.grant(now)
        while now < ends_at and self._load_piece():
            now = time.perf_counter()
        self._pacer.used(now)

    def undo(self) -> int:
        """Give everything up again; returns the blocks of the layers that are served."""
        self._pieces = iter(())
        self._runner.keep(self._runner.span)
        return self._runner.settle()

    def _load_piece(self) -> bool:
        """Load some more; False where nothing can be loaded now, or all is."""
        num_bytes = next(self._pieces, None)
        if num_bytes is not None:
            self._num_bytes += num_bytes
            return num_bytes > 0
        self.state = RestorationState.LOADED
        seconds = time.perf_counter() - self._began_at
        self._emit(PhaseTimed(Phase.LOAD, seconds, self._num_bytes))
        self._source.report(self._emit)
        self._emit(Prepared(self.epoch))
        return False
