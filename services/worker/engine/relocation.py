"""Requests that change their route: at a drop, at a restore, one by one or all at once.

Called by the worker's transition, between batches; decides, and leaves bytes to the exchange code.

    drop, at a follower    hand_over_all()                       -> sent to the leader
    drop, at the leader    enter(pipeline); park_running(); adopt(...) each
                           start_exchanges(n) -> order transfers; filled(...) ...; is_settled
    restore                enter(replica), then for each pipelined request, while others run:
      stays here           move(request, replica), then as above
      goes to a member     hand_over(request)       there: adopt(request, ...), then as above
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from services.worker.engine.exchange import Exchange, exchange_order
from services.worker.engine.request import KvKey, Request, RequestKey, RequestStatus
from services.worker.engine.request_pool import RequestPool
from services.worker.engine.routes import Route, WorkerId
from shared.errors import KunserveError


class RelocationError(KunserveError):
    """A request cannot change its route now."""


class Relocation:
    """The part of a scheduler that moves requests between routes. Not thread-safe."""

    def __init__(self, pool: RequestPool, worker_id: WorkerId) -> None:
        self._pool = pool
        self._worker_id = worker_id

    # --- what is there ---------------------------------------------------------------------------

    @property
    def route(self) -> Route:
        """Where requests without KV are admitted."""
        return self._pool.route

    @property
    def is_settled(self) -> bool:
        """True if every request that has KV runs on the route of new ones."""
        return not self.unsettled_requests

    @property
    def unsettled_requests(self) -> list[Request]:
        """Requests that are parked, travel, or run on another route; oldest first in each group."""
        pool = self._pool
        strays = [request for request in pool.running if request.route != pool.route]
        return [*pool.parked, *pool.exchanging, *strays]

    @property
    def queued_requests(self) -> list[Request]:
        """Requests without KV; the preempted first."""
        return [*self._pool.preempted, *self._pool.waiting]

    @property
    def exchanges(self) -> Mapping[RequestKey, Exchange]:
        """What each parked or exchanging request waits for."""
        return self._pool.exchanges

    @property
    def homes(self) -> dict[WorkerId, list[Request]]:
        """Requests whose KV has to travel, or may have to again, by the workers it lies on."""
        homes: dict[WorkerId, list[Request]] = {}
        for exchange in self._pool.exchanges.values():
            for worker_id in exchange.origin.worker_ids:
                homes.setdefault(worker_id, []).append(exchange.request)
        return homes

    def lacks_room(self, max_in_progress: int) -> bool:
        """True if a request is parked that `start_exchanges` would start if it had room."""
        pool = self._pool
        return len(pool.parked) > 0 and len(pool.exchanging) < max_in_progress

    # --- the layout changes ----------------------------------------------------------------------

    def enter(self, route: Route) -> None:
        """Admit requests without KV to `route` from now on.

        Nothing is scheduled before its other members have granted blocks (`add_capacity`).
        Requests that run stay where they are.
        """
        self._check_leads(route)
        self._pool.route = route

    def park_running(self) -> None:
        """Park all that have KV for the exchange to the present route; those on it stay.

        Raises:
            RelocationError: a batch is in flight; nothing has changed.
        """
        pool = self._pool
        self._check_boundary(pool.running)
        for request in list(pool.running):
            self.move(request, pool.route)
        for exchange in list(pool.exchanges.values()):
            if exchange.target != pool.route:
                pool.take_back(exchange, pool.route)

    def move(self, request: Request, target: Route) -> bool:
        """Park a running request for the exchange to `target`.

        Returns False, having changed nothing, for a request that is in flight or already there;
        ask again after its batch has returned and before the next `schedule`.
        """
        self._check_leads(target)
        if request.is_in_flight or request.status is not RequestStatus.RUNNING:
            return False
        if request.route is None or request.route == target:
            return False
        self._pool.park(request, request.route, target)
        return True

    def recompute_outside(self, workers: Collection[WorkerId]) -> None:
        """Requests with KV on others than `workers` are computed again: nobody could fetch it.

        Raises:
            RelocationError: one of them is in flight; nothing has changed.
        """
        pool = self._pool
        lost = [
            request
            for request in (*pool.running, *pool.parked, *pool.exchanging)
            if request.route is not None and not set(request.route.worker_ids).issubset(workers)
        ]
        self._check_boundary(lost)
        for request in lost:
            pool.preempt(request)

    # --- between schedulers ----------------------------------------------------------------------

    def hand_over_all(self) -> list[Request]:
        """All requests leave for another worker's scheduler, in order of arrival.

        They are WAITING, PREEMPTED or PARKED afterwards; `route` of a parked one says where its KV
        lies, and on this worker it is held by key in `GroupBlocks.stage` until it is released.

        Raises:
            RelocationError: a batch is in flight; nothing has changed.
        """
        requests = sorted(self._pool.requests.values(), key=lambda r: r.arrival_seconds)
        self._check_boundary(requests)
        for request in requests:
            self.hand_over(request)
        return requests

    def hand_over(self, request: Request) -> None:
        """One request leaves for another worker's scheduler; see `hand_over_all`.

        Raises:
            RelocationError: it is in flight; nothing has changed.
        """
        self._check_boundary((request,))
        pool = self._pool
        if request.status is RequestStatus.RUNNING and request.route is not None:
            pool.park(request, request.route, request.route)
        elif request.status is RequestStatus.EXCHANGING:
            exchange = pool.exchanges[request.key]
            pool.take_back(exchange, exchange.origin)
        pool.hand_over(request)

    def adopt(self, request: Request, target: Route) -> None:
        """Take over a request from another worker's scheduler as `hand_over` left it there.

        Args:
            request: WAITING, PREEMPTED or PARKED; in the last case its `route` says where its KV
                lies. Its block table must be empty: blocks on this worker are found by key.
            target: where it shall go on if it has KV.

        Raises:
            RelocationError: a request of this id and attempt is here already, or is in no state to
                be adopted; nothing has changed.
        """
        self._check_leads(target)
        pool = self._pool
        if request.key in pool.requests:
            raise RelocationError(f"request {request.request_id} is here already")
        if request.status is RequestStatus.PARKED and request.route is not None:
            pool.adopt_parked(request, request.route, target)
        elif request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            pool.add(request)
        else:
            raise RelocationError(
                f"request {request.request_id} cannot be adopted as {request.status.name}"
            )

    # --- the exchange ----------------------------------------------------------------------------

    def start_exchanges(self, max_in_progress: int) -> list[Exchange]:
        """Begin exchanges, fewest bytes first, until `max_in_progress` are under way.

        The caller orders the `transfers` of each that is returned, and tells each destination first
        what it shall free (`Releases.pending`); one without transfers runs again at once. Call it
        again whenever an exchange ends. Where a stage has no room the first in line for it waits
        for requests that run or travel; if there are none it is given up. Those behind whose KV
        goes to other stages pass: what they leave behind may be the very room it waits for.
        """
        pool = self._pool
        started = []
        full: set[WorkerId] = set()
        parked = (exchange for exchange in pool.exchanges.values() if _is_parked(exchange))
        for exchange in exchange_order(parked):
            request = exchange.request
            if len(pool.exchanging) >= max_in_progress:
                break
            if not full.isdisjoint(exchange.pending):
                continue
            if pool.begin_exchange(exchange):
                started.append(exchange)
                if not exchange.pending:
                    pool.resume(exchange)
            elif pool.running or pool.exchanging:
                full.update(pool.blocks.short_stages(request, exchange.target, request.num_tokens))
            else:
                self.give_up(request)
        return started

    def filled(self, key: KvKey, worker_id: WorkerId) -> bool:
        """Take note that all KV of `key` that was missing on a worker has arrived.

        Returns True if the request runs again. Late news, of an exchange that was given up or of a
        request that ended, is ignored.
        """
        exchange = self._pool.exchanges.get(RequestKey(key.request_id, key.attempt))
        if exchange is None or exchange.request.kv_key != key or _is_parked(exchange):
            return False
        exchange.pending.discard(worker_id)
        if exchange.pending:
            return False
        self._pool.resume(exchange)
        return True

    def give_up(self, request: Request) -> None:
        """Free what a parked or exchanging request holds everywhere; it is computed again."""
        if request.key not in self._pool.exchanges:
            raise RelocationError(f"request {request.request_id} is not being exchanged")
        self._pool.preempt(request)

    def _check_leads(self, route: Route) -> None:
        if route.leader != self._worker_id:
            raise RelocationError(
                f"route {route.route_id} is led by {route.leader}, not by {self._worker_id}"
            )

    def _check_boundary(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request.is_in_flight:
                raise RelocationError(f"request {request.request_id} is in flight")


def _is_parked(exchange: Exchange) -> bool:
    return exchange.request.status is RequestStatus.PARKED
