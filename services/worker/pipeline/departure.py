"""How requests leave a pipeline whose leader serves in another group now, or alone.

where it may go on meanwhile   oldest first, a few at a time, each is parked and its KV moved
where layers were given up     all were parked at once; nothing runs on it any more

What its stages granted is given back bit by bit, so that they can use it for whom they serve now.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from services.worker.engine.request import Request, RequestStatus
from services.worker.engine.scheduler import Scheduler
from services.worker.engine.spreading import spread
from services.worker.pipeline.events import EventSink, HandedOver
from services.worker.pipeline.messages import Dissolve, FrameKind, GiveBack
from services.worker.pipeline.peers import GroupPeers

#: Requests that stand still at once on their way home.
_MAX_PARKED = 4


class Departure:
    """From the commit of the next layout until nobody is left on the pipeline of this one.

    Attributes:
        is_over: True when the pipeline is dissolved.
        awaited: members that have not taken over the requests yet which are to wait with them.
    """

    def __init__(
        self,
        peers: GroupPeers,
        scheduler: Scheduler,
        emit: EventSink,
        flush_releases: Callable[[], None],
        kept: Collection[str],
        *,
        is_superseded: bool,
    ) -> None:
        """Begin.

        Args:
            kept: members that this worker leads in its next group too.
            is_superseded: the next group moves all KV: this pipeline is not needed any more.
        """
        self._leaving = tuple(worker for worker in peers.followers if worker not in kept)
        self.awaited: set[str] = set()
        self.is_over = False
        self._peers = peers
        self._route = peers.route
        self._scheduler = scheduler
        self._emit = emit
        self._flush_releases = flush_releases
        self._is_superseded = is_superseded

    def pump(self) -> None:
        """Let requests leave, give back what they free, and dissolve what nobody needs."""
        if self.is_over:
            return
        self._call_home()
        given_back = self._give_back()
        if given_back:
            self._flush_releases()
            self._peers.send_next(FrameKind.GIVE_BACK, GiveBack(num_blocks=given_back))
        if self.awaited or (self._requests() and not self._is_superseded):
            return
        self._flush_releases()
        self._peers.send_next(FrameKind.DISSOLVE, Dissolve())
        for worker_id in self._leaving:
            self._scheduler.blocks.forget_worker(worker_id)
        self.is_over = True

    def hand_on_queued(self, heirs: Mapping[str, int]) -> None:
        """Let requests without KV wait with whoever of the next leaders has the least to do.

        Args:
            heirs: how many members each of them has.
        """
        if not heirs:
            return
        own, blocks = self._peers.worker_id, self._scheduler.blocks
        relocation = self._scheduler.relocation
        used = {heir: blocks.num_used(own) if heir == own else 0 for heir in heirs}
        shares = spread(relocation.queued_requests, used, heirs, blocks.blocks_for)
        for heir, requests in shares.items():
            if heir == own or not requests:
                continue
            for request in requests:
                relocation.hand_over(request)
            self.awaited.add(heir)
            self._emit(HandedOver(self._peers, heir, tuple(requests)))

    def _call_home(self) -> None:
        """Park requests that run on the pipeline for their way to the present route."""
        relocation = self._scheduler.relocation
        unsettled = relocation.unsettled_requests
        num_free = _MAX_PARKED - sum(r.status is not RequestStatus.RUNNING for r in unsettled)
        for request in unsettled:
            if num_free <= 0:
                return
            num_free -= relocation.move(request, relocation.route)

    def _give_back(self) -> dict[str, int]:
        """Blocks of each leaving member that are booked no more; nothing that is nothing.

        Each request that decodes may need another block before it leaves.
        """
        num_spare = 0 if self._is_superseded else len(self._requests())
        blocks = self._scheduler.blocks
        given_back = {
            worker: blocks.give_back(worker, blocks.num_used(worker) + num_spare)
            for worker in self._leaving
        }
        return {worker: count for worker, count in given_back.items() if count}

    def _requests(self) -> list[Request]:
        """Those that run on the pipeline, or have their KV there."""
        return [r for r in self._scheduler.requests.values() if r.route == self._route]
