"""All pipelines that one worker leads: the one it serves, and those that requests still leave.

Their stages overlap, and a stage hears of one booking over several chains. So releases go down all
of them, before whatever follows. Engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.worker.engine.exchange import Exchange
from services.worker.engine.scheduler import Scheduler
from services.worker.pipeline.leader import PipelineLeader

#: Requests whose KV travels at once: enough to keep the links busy between two batches.
_MAX_EXCHANGES = 16


class Leadership:
    """What a worker does for all pipelines that it leads together.

    Attributes:
        leaders: the newest last.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.leaders: list[PipelineLeader] = []
        self._scheduler = scheduler

    def flush_releases(self) -> None:
        """Tell all stages whose blocks they shall free."""
        releases = self._scheduler.blocks.releases
        released = releases.pending()
        if not released:
            return
        for leader in self.leaders:
            leader.release(released)
        releases.confirm(released)  # whatever follows, follows it down each chain

    def start_exchanges(self) -> None:
        """Order the KV of parked requests, over the links that reach where it goes."""
        if not self.leaders or not all(leader.is_complete for leader in self.leaders):
            return
        for exchange in self._scheduler.relocation.start_exchanges(_MAX_EXCHANGES):
            if exchange.transfers:
                self._order(exchange)
        if self._scheduler.relocation.lacks_room(_MAX_EXCHANGES):
            self.leaders[-1].make_room()

    def _order(self, exchange: Exchange) -> None:
        leader = _reaching(self.leaders, exchange)
        if leader is None:  # nobody has links to all of them
            self._scheduler.relocation.give_up(exchange.request)
        else:
            leader.order(exchange)


def _reaching(leaders: Sequence[PipelineLeader], exchange: Exchange) -> PipelineLeader | None:
    return next((leader for leader in reversed(leaders) if leader.reaches(exchange)), None)
