"""A member gets its missing layers back while its pipeline serves. Engine thread.

SHRINKING  blocks that a whole replica cannot hold are given up, at a batch boundary
LOADING    their chunks become weights again, one part of the model between two batches
WHOLE      every layer has its weights and as many KV blocks as a replica has
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from enum import Enum, auto

from services.worker.engine.block_manager import BlockMove
from services.worker.facts import model_facts
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.events import EventSink, Restored
from services.worker.pipeline.peers import GroupPeers


class RestorationState(Enum):
    """How far it is; only ever goes on."""

    SHRINKING = auto()
    LOADING = auto()
    WHOLE = auto()


class Restoration:
    """One restore of one member, until it is committed or called off.

    Attributes:
        epoch: of the plan that asks for it.
    """

    def __init__(self, peers: GroupPeers, runner: ModelRunner, emit: EventSink, epoch: int) -> None:
        self.epoch = epoch
        self.state = RestorationState.SHRINKING
        self._peers = peers
        self._runner = runner
        self._emit = emit
        self._parts: Generator[str, None, None] | None = None

    def shrunk(self, moves: Sequence[BlockMove]) -> None:
        """Blocks that are left are numbered as a replica numbers them, after these moves."""
        self._runner.shrink(self._runner.replica_blocks, moves)
        self._parts = self._runner.load_missing()
        self.state = RestorationState.LOADING

    @property
    def is_busy(self) -> bool:
        """True while `pump` has something to do."""
        return self.state is RestorationState.LOADING

    def pump(self) -> None:
        """Load one part, if it is time for that."""
        if self._parts is None or not self.is_busy:
            return
        if next(self._parts, None) is None:
            self.state = RestorationState.WHOLE
            self._emit(Restored(self._peers.key, model_facts(self._runner)))

    def undo(self) -> int:
        """Give everything up again; returns the blocks of the layers that are kept."""
        if self._parts is not None:
            self._parts.close()
        self._runner.keep(self._peers.span)
        return self._runner.settle()
