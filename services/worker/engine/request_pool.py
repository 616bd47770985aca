"""All unfinished requests of an engine, each in the queue of its state, and their blocks.

Every change of state that takes or returns blocks is one method here, so that status, queue and
blocks cannot disagree. Policy (who, when) is the scheduler's.

    waiting ----admit----> running ----finish----> gone
                  ^          |
               admit      preempt
                  |          v
                 preempted <-+
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from services.worker.engine.block_manager import BlockIntegrityError, BlockManager
from services.worker.engine.request import Request, RequestKey, RequestStatus
from services.worker.engine.request_queue import RequestQueue
from shared.messages import FinishReason

_FINISHED_AS = {
    FinishReason.STOP: RequestStatus.FINISHED_STOPPED,
    FinishReason.LENGTH: RequestStatus.FINISHED_LENGTH,
    FinishReason.ERROR: RequestStatus.FINISHED_ERROR,
    FinishReason.ABORT: RequestStatus.FINISHED_ABORTED,
}


class RequestPool:
    """The waiting, the preempted and the running; requests being cancelled count as running."""

    def __init__(self, block_manager: BlockManager) -> None:
        self.blocks = block_manager
        self.waiting = RequestQueue()
        self.preempted = RequestQueue()
        self.running = RequestQueue()
        self.num_preemptions = 0
        self._requests: dict[RequestKey, Request] = {}
        self._queues = {
            RequestStatus.WAITING: self.waiting,
            RequestStatus.PREEMPTED: self.preempted,
            RequestStatus.RUNNING: self.running,
            RequestStatus.CANCELLING: self.running,
        }

    @property
    def requests(self) -> Mapping[RequestKey, Request]:
        """Every unfinished request."""
        return MappingProxyType(self._requests)

    @property
    def queued_blocks(self) -> int:
        """Blocks that all waiting and preempted requests need to start."""
        queued = (*self.preempted, *self.waiting)
        return sum(self.blocks.blocks_for(request.num_tokens) for request in queued)

    def add(self, request: Request) -> None:
        """Let a new request wait."""
        self._requests[request.key] = request
        self._queues[request.status].add(request)

    def admit(self, request: Request, now: float) -> None:
        """Give a queued request a seat and blocks for all its tokens, which must be free."""
        if not self.blocks.allocate(request, request.num_tokens):
            raise BlockIntegrityError(
                f"request {request.request_id} was admitted without enough free blocks"
            )
        if request.first_scheduled_seconds is None:
            request.first_scheduled_seconds = now
        self._move(request, RequestStatus.RUNNING)

    def preempt(self, request: Request) -> None:
        """Take a running request's seat and blocks; it computes its tokens again later."""
        self.blocks.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._move(request, RequestStatus.PREEMPTED)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Forget a request and free its blocks; it must not be in flight."""
        self.blocks.free(request)
        self._queues[request.status].remove(request)
        request.transition(_FINISHED_AS[reason])
        del self._requests[request.key]

    def check_integrity(self) -> None:
        """Raise BlockIntegrityError unless blocks, queues and states agree."""
        self.blocks.check_integrity(self._requests.values())
        for status, queue in self._queues.items():
            members = [request for request in queue if request.status is status]
            expected = [request for request in self._requests.values() if request.status is status]
            if {id(request) for request in members} != {id(request) for request in expected}:
                raise BlockIntegrityError(f"the queue of {status.name} requests has other members")
        num_queued = len(self.waiting) + len(self.preempted) + len(self.running)
        if num_queued != len(self._requests):
            raise BlockIntegrityError(
                f"{num_queued} requests are queued, {len(self._requests)} are known"
            )

    def _move(self, request: Request, status: RequestStatus) -> None:
        self._queues[request.status].remove(request)
        request.transition(status)
        self._queues[status].add(request)
