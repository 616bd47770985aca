"""How the leader of a pipeline makes room for layers that its members need next.

followers' ShrinkRequests, own target --all here, nothing in flight--> shrink, GiveBack to all

Then every member loads what it lacks, while the pipeline serves.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from services.worker.engine.scheduler import PauseState, Scheduler
from services.worker.engine.shrinking import ShrinkError
from services.worker.pipeline.events import EventSink, PrepareFailed
from services.worker.pipeline.messages import GiveBack, ShrinkRequest
from services.worker.pipeline.peers import GroupPeers
from services.worker.pipeline.restoration import Restoration, RestorationState


class LeaderPreparation:
    """The leader's part of one preparation, until it is committed or called off."""

    def __init__(
        self,
        peers: GroupPeers,
        scheduler: Scheduler,
        restoration: Restoration,
        emit: EventSink,
        give_back: Callable[[GiveBack], None],
    ) -> None:
        """Begin.

        Args:
            give_back: tells the stages, after all releases so far.
        """
        self._peers = peers
        self._scheduler = scheduler
        self._restoration = restoration
        self._emit = emit
        self._give_back = give_back
        self._targets = {peers.worker_id: restoration.num_blocks}
        self._log = structlog.get_logger(component="preparation", group=peers.key.group_id)

    @property
    def epoch(self) -> int:
        """Of the plan that asks for it."""
        return self._restoration.epoch

    @property
    def is_busy(self) -> bool:
        """True while `pump` has something to do whatever arrives."""
        return self._restoration.is_busy

    def note(self, request: ShrinkRequest) -> None:
        """A follower says how much room it will have."""
        self._targets[request.worker_id] = request.num_blocks

    def pump(self) -> None:
        """Shrink when all are ready for it, then load."""
        if self._restoration.state is RestorationState.SHRINKING:
            self._try_shrink()
        self._restoration.pump()

    def undo(self) -> None:
        """The pipeline stays; the followers grow by themselves and say so."""
        self._scheduler.pause(PauseState.RUNNING)
        self._scheduler.blocks.grow(self._restoration.undo())

    def _try_shrink(self) -> None:
        if self._targets.keys() != set(self._peers.route.worker_ids):
            return
        self._scheduler.pause(PauseState.STOPPED)
        if self._scheduler.num_batches_in_flight:
            return
        try:
            plan = self._scheduler.plan_shrink(self._targets)
            result = self._scheduler.shrink(plan)
        except ShrinkError as error:
            self._targets.clear()
            self._emit(PrepareFailed(self.epoch, str(error)))
        else:
            self._log.info(
                "blocks given up", preempted=len(plan.preempted), moved=len(result.moves)
            )
            self._give_back(GiveBack(epoch=self.epoch, num_blocks=dict(result.given_back)))
            self._restoration.shrunk(result.moves)
        self._scheduler.pause(PauseState.RUNNING)
