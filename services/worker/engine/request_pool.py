"""All unfinished requests of an engine, each in the queue of its state, and their blocks.

Every change of state that takes or returns blocks is one method here, so that status, queue and
blocks cannot disagree. Policy (who, when) belongs to the batch builder and to `Relocation`.

    waiting ---admit--> running ---end--> gone           (end, preempt: from any state)
                 ^       |   |
              admit  preempt park ---> parked ---begin_exchange---> exchanging
                 |       v            (KV elsewhere)              (travels) ---resume--> running
               preempted

No block leaves a request that is in flight, because a batch still writes to it: whoever tries is
refused, and who ends in flight is only `ENDING` until its last batch has returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from services.worker.engine.block_manager import BlockIntegrityError
from services.worker.engine.exchange import Exchange
from services.worker.engine.group_blocks import GroupBlocks
from services.worker.engine.request import Request, RequestKey, RequestStatus
from services.worker.engine.request_queue import RequestQueue
from services.worker.engine.routes import Route
from shared.messages import FinishReason

_FINISHED_AS = {
    FinishReason.STOP: RequestStatus.FINISHED_STOPPED,
    FinishReason.LENGTH: RequestStatus.FINISHED_LENGTH,
    FinishReason.ERROR: RequestStatus.FINISHED_ERROR,
    FinishReason.ABORT: RequestStatus.FINISHED_ABORTED,
}


class RequestPool:
    """Requests by state; those that are ending count as running.

    Attributes:
        route: where requests without KV are admitted.
    """

    def __init__(self, blocks: GroupBlocks, route: Route) -> None:
        self.blocks = blocks
        self.route = route
        self.waiting = RequestQueue()
        self.preempted = RequestQueue()
        self.running = RequestQueue()
        self.parked = RequestQueue()
        self.exchanging = RequestQueue()
        self.num_preemptions = 0
        self._requests: dict[RequestKey, Request] = {}
        self._exchanges: dict[RequestKey, Exchange] = {}
        self._queues = {
            RequestStatus.WAITING: self.waiting,
            RequestStatus.PREEMPTED: self.preempted,
            RequestStatus.RUNNING: self.running,
            RequestStatus.ENDING: self.running,
            RequestStatus.PARKED: self.parked,
            RequestStatus.EXCHANGING: self.exchanging,
        }

    @property
    def requests(self) -> Mapping[RequestKey, Request]:
        """Every unfinished request."""
        return MappingProxyType(self._requests)

    @property
    def exchanges(self) -> Mapping[RequestKey, Exchange]:
        """What each parked or exchanging request waits for."""
        return MappingProxyType(self._exchanges)

    @property
    def queued_blocks(self) -> int:
        """Blocks that all waiting and preempted requests need to start."""
        queued = (*self.preempted, *self.waiting)
        return sum(self.blocks.blocks_for(request.num_tokens) for request in queued)

    def add(self, request: Request) -> None:
        """Let a request without KV wait."""
        self._requests[request.key] = request
        self._queues[request.status].add(request)

    def admit(self, request: Request, now: float) -> None:
        """Give a queued request a seat and blocks for all its tokens, which must be free."""
        if not self.blocks.allocate(request, self.route, request.num_tokens):
            raise BlockIntegrityError(
                f"request {request.request_id} was admitted without enough free blocks"
            )
        if request.first_scheduled_seconds is None:
            request.first_scheduled_seconds = now
        request.route = self.route
        self._move(request, RequestStatus.RUNNING)

    def preempt(self, request: Request) -> None:
        """Take a request's seat and blocks on every stage; it computes its tokens again later."""
        _check_rests(request)
        self.blocks.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.route = None
        self.num_preemptions += 1
        self._exchanges.pop(request.key, None)
        self._move(request, RequestStatus.PREEMPTED)

    def end(self, request: Request, reason: FinishReason) -> None:
        """Forget a request and free its blocks on every stage; the first reason counts.

        While it is in flight that is only decided: to be called again when its batch has returned.
        """
        request.outcome = request.outcome or _FINISHED_AS[reason]
        if not request.is_in_flight:
            self.blocks.free(request)
            request.route = None
            self._remove(request)
            request.transition(request.outcome)
        elif request.status is not RequestStatus.ENDING:
            request.transition(RequestStatus.ENDING)

    # --- requests whose KV travels ---------------------------------------------------------------

    def park(self, request: Request, origin: Route, target: Route) -> None:
        """Take a running request's seat until its KV is where `target` needs it.

        It keeps the blocks of its computed tokens. If there are none it is preempted instead.
        """
        _check_rests(request)
        if request.num_computed_tokens == 0:
            self.preempt(request)
            return
        self.blocks.trim(request, request.num_computed_tokens)
        self._exchanges[request.key] = Exchange(request, origin, target)
        self._move(request, RequestStatus.PARKED)

    def adopt_parked(self, request: Request, origin: Route, target: Route) -> None:
        """Take over a parked request and its blocks from another worker's scheduler."""
        self.blocks.adopt(request, origin)
        self._exchanges[request.key] = Exchange(request, origin, target)
        self.add(request)

    def begin_exchange(self, exchange: Exchange) -> bool:
        """Book blocks for all tokens on every stage of the target; False if a stage is short."""
        request = exchange.request
        if not self.blocks.allocate(request, exchange.target, request.num_tokens):
            return False
        self._move(request, RequestStatus.EXCHANGING)
        return True

    def take_back(self, exchange: Exchange, target: Route) -> None:
        """Let a parked or exchanging request wait for another exchange, towards `target`."""
        request = exchange.request
        if request.status is RequestStatus.EXCHANGING:
            self.blocks.free(request, kept=exchange.origin.worker_ids)
            self.blocks.trim(request, request.num_computed_tokens)
            self._move(request, RequestStatus.PARKED)
        self._exchanges[request.key] = Exchange(request, exchange.origin, target)

    def resume(self, exchange: Exchange) -> None:
        """Let a request run along its new route; blocks on workers outside of it are freed."""
        request = exchange.request
        self.blocks.free(request, kept=exchange.target.worker_ids)
        request.route = exchange.target
        del self._exchanges[request.key]
        self._move(request, RequestStatus.RUNNING)

    def hand_over(self, request: Request) -> None:
        """Forget a request that another worker's scheduler takes over; its KV stays."""
        _check_rests(request)
        self.blocks.hand_over(request)
        self._remove(request)

    # --- integrity -------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise BlockIntegrityError unless blocks, queues and states agree."""
        self.blocks.check_integrity(self._requests.values())
        for status, queue in self._queues.items():
            members = [request for request in queue if request.status is status]
            expected = [request for request in self._requests.values() if request.status is status]
            if {id(request) for request in members} != {id(request) for request in expected}:
                raise BlockIntegrityError(f"the queue of {status.name} requests has other members")
        num_queued = sum(len(queue) for queue in {id(q): q for q in self._queues.values()}.values())
        if num_queued != len(self._requests):
            raise BlockIntegrityError(
                f"{num_queued} requests are queued, {len(self._requests)} are known"
            )
        travelling = {request.key for request in (*self.parked, *self.exchanging)}
        if travelling != self._exchanges.keys():
            raise BlockIntegrityError("the exchanges are not those of the parked requests")

    def _remove(self, request: Request) -> None:
        self._queues[request.status].remove(request)
        self._exchanges.pop(request.key, None)
        del self._requests[request.key]

    def _move(self, request: Request, status: RequestStatus) -> None:
        self._queues[request.status].remove(request)
        request.transition(status)
        self._queues[status].add(request)


def _check_rests(request: Request) -> None:
    """Raise BlockIntegrityError if a batch in flight writes the blocks of `request`."""
    if request.is_in_flight:
        raise BlockIntegrityError(f"request {request.request_id} is in flight")
