"""How the leader of a pipeline dissolves it: makes room, becomes whole, takes its requests home.

followers' ShrinkRequests, own target --all here, nothing in flight--> shrink, GiveBack to all
commit  -> new requests run on this worker alone; pipelined ones come home a few at a time,
           both kinds side by side, until none is left: then Dissolve
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from services.worker.engine.request import RequestStatus
from services.worker.engine.routes import Route, RouteStage
from services.worker.engine.scheduler import PauseState, Scheduler
from services.worker.engine.shrinking import ShrinkError
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.events import EventSink, PrepareFailed
from services.worker.pipeline.messages import GiveBack, ShrinkRequest
from services.worker.pipeline.peers import GroupPeers
from services.worker.pipeline.restoration import Restoration, RestorationState
from shared.layout import Span


def replica_route(worker_id: str, num_layers: int) -> Route:
    """The route of a worker that serves alone."""
    return Route("replica", (RouteStage(worker_id, 0, num_layers),))


class LeaderRestore:
    """The leader's part of one restore; made when the plan prepares it."""

    def __init__(
        self,
        peers: GroupPeers,
        runner: ModelRunner,
        scheduler: Scheduler,
        emit: EventSink,
        give_back: Callable[[GiveBack], None],
        epoch: int,
    ) -> None:
        """Begin.

        Args:
            give_back: tells the stages, after all releases so far.
        """
        self.is_committed = False
        self._peers = peers
        self._runner = runner
        self._scheduler = scheduler
        self._emit = emit
        self._give_back = give_back
        self._targets = {peers.worker_id: runner.replica_blocks}
        whole = Span(start=0, end=runner.config.num_layers)
        self._restoration = Restoration(peers, runner, emit, epoch, whole)
        self._log = structlog.get_logger(component="restore", group=peers.key.group_id)

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

    def commit(self) -> None:
        """New requests run here alone from now on; the stages keep what they hold."""
        self.is_committed = True
        self._runner.serve_all()
        route = replica_route(self._peers.worker_id, self._runner.config.num_layers)
        self._scheduler.relocation.enter(route)
        blocks, num_requests = self._scheduler.blocks, len(self._scheduler.requests)
        given_back = {}
        for worker_id in self._peers.followers:
            # Each request that decodes may need another block before it comes home.
            num_kept = blocks.num_used(worker_id) + num_requests
            given_back[worker_id] = blocks.give_back(worker_id, num_kept)
        self._give_back(GiveBack(num_blocks=given_back))

    def call_home(self, max_in_progress: int) -> None:
        """Park pipelined requests for their way home, few at a time, oldest first."""
        relocation = self._scheduler.relocation
        unsettled = relocation.unsettled_requests
        num_free = max_in_progress - sum(r.status is not RequestStatus.RUNNING for r in unsettled)
        for request in unsettled:
            if num_free <= 0:
                return
            num_free -= relocation.move(request, relocation.route)

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
            self._emit(PrepareFailed(self._peers.key, str(error)))
        else:
            self._log.info(
                "blocks given up", preempted=len(plan.preempted), moved=len(result.moves)
            )
            self._give_back(GiveBack(num_blocks=dict(result.given_back)))
            self._restoration.shrunk(result.moves)
        self._scheduler.pause(PauseState.RUNNING)
