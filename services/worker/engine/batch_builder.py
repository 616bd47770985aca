"""Fills one batch of one route: who is served, who is admitted, who must give way.

A batch is filled in three passes within `max_num_batched_tokens` and within what `pacing.py` allows
on a pipeline, or while KV travels:
1. running requests that decode, one token each, oldest first (a long prefill, also one that
   resumes, never holds up the tokens of the others);
2. running requests that are not prefilled yet, oldest first;
3. admissions, first come, first served, on the route of the present layout. A request is admitted
   only if blocks for *all* its present tokens are free on every stage, and gets them at once, so
   half-prefilled requests cannot starve each other; a watermark stays free so that running requests
   can grow, and room for the next request whose KV shall travel. The head of the queue is never
   overtaken.

Progress. Only a request older than its victim may preempt it, so nothing can take the blocks of the
oldest running request, which therefore finishes; then the next is the oldest. A request for which
no younger one can give way waits with its blocks for the next batch: that wastes no computed token.
Parked requests do not run, so they give way at any age, if nobody else can: each only once.
A step that preempts admits nobody, preempted requests resume before new ones start, and they must
leave the larger `recovery_watermark` free. A batch that is made while another one is computed never
preempts (`overlap.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from services.worker.engine.config import SchedulerConfig
from services.worker.engine.cost_model import ChunkShape
from services.worker.engine.exchange import exchange_order
from services.worker.engine.lanes import Lane
from services.worker.engine.outputs import ScheduledRequest, SchedulerOutput
from services.worker.engine.overlap import have_room, may_follow
from services.worker.engine.pacing import DecodeShare
from services.worker.engine.request import Request, RequestStatus
from services.worker.engine.request_pool import RequestPool


class BatchBuilder:
    """Makes one batch; the scheduler uses a fresh one for each.

    Attributes:
        scheduled: the batch so far.
        preempted: requests that lost their blocks for it.
    """

    def __init__(self, config: SchedulerConfig, pool: RequestPool, lane: Lane) -> None:
        self.scheduled: list[ScheduledRequest] = []
        self.preempted: list[Request] = []
        self._config = config
        self._pool = pool
        self._route = route = lane.route
        self._pacer = lane.pacer
        self._is_ahead = lane.is_ahead
        self._budget = config.max_num_batched_tokens
        self._prefill_cost = 0.0
        self._members = [r for r in pool.running if r.route is route or r.route == route]

    def build(self, now: float, *, admits_new: bool) -> None:
        """Run the three passes. Without `admits_new`, only preempted requests get seats."""
        decodes = [request for request in self._members if request.num_unscheduled_tokens < 2]
        ready = [request for request in decodes if self._is_ready(request)]
        if self._is_ahead and not have_room(ready, self._pool.blocks, self._route):
            return
        decode_cost = self._schedule_decodes(decodes, ready)
        num_decodes = len(self.scheduled)
        if self._pacer.needs_round:
            self._pacer.begin_round(self._queued_prefill(admits_new))
        kv_travels = bool(self._pool.exchanging)
        self._prefill_cost = self._pacer.prefill_cost(decode_cost, kv_travels=kv_travels)
        self._schedule_prefills()
        if not self.preempted and self._route == self._pool.route:
            self._admit(now, admits_new)
        if self.scheduled:
            self._pacer.batch_made(has_prefill=len(self.scheduled) > num_decodes)

    def output(self, step: int) -> SchedulerOutput:
        """The batch, numbered."""
        released = self._pool.blocks.releases.pending(self._route.worker_ids)
        return SchedulerOutput(
            step, tuple(self.scheduled), tuple(self.preempted), self._route, released
        )

    # --- the passes ------------------------------------------------------------------------------

    def _schedule_decodes(self, decodes: Sequence[Request], ready: Sequence[Request]) -> float:
        """First pass; whoever gets no block for its next token is left for a later batch.

        Args:
            decodes: all requests that decode on the route; `ready` are those it may contain.

        Returns the cost of those that are in the batch.
        """
        share = DecodeShare(decodes, self._route.num_stages, self._pacer.model)
        for request in share.in_turn(ready):
            if self._budget == 0 or share.is_taken:
                break
            if self._is_ready(request) and self._make_room(request):
                self._take(request, 1)
                share.take(request)
        self.scheduled.sort(key=lambda item: item.request.arrival_seconds)
        return share.cost

    def _schedule_prefills(self) -> None:
        """Second pass."""
        for request in self._members:
            if request.num_unscheduled_tokens > 1 and self._is_ready(request):
                if self._is_full:
                    return
                self._take_prefill(request)

    def _admit(self, now: float, admits_new: bool) -> None:
        """Third pass: give seats and blocks to those who wait, in order, while both last."""
        num_seats = self._config.max_num_seqs * self._route.num_stages - self._num_seats_taken()
        reserve = self._exchange_reserve()
        while not self._is_full and num_seats > 0:
            request = self._next_admission(admits_new, reserve)
            if request is None:
                return
            self._pool.admit(request, now)
            self._take_prefill(request)
            num_seats -= 1

    def _next_admission(self, admits_new: bool, reserve: int) -> Request | None:
        """The head of the queue if its tokens fit; preempted requests go before waiting ones."""
        pool = self._pool
        num_blocks = pool.blocks.route_capacity(self._route)
        if pool.preempted:
            request = pool.preempted[0]
            spare_blocks = self._config.recovery_watermark_blocks(num_blocks) + reserve
        elif pool.waiting and admits_new:
            request = pool.waiting[0]
            spare_blocks = self._config.watermark_blocks(num_blocks) + reserve
        else:
            return None
        if not pool.running and not pool.exchanges:
            spare_blocks = 0  # nobody could grow into it, and a request of any size must start
        short = pool.blocks.short_stages(request, self._route, request.num_tokens, spare_blocks)
        return None if short else request

    # --- who counts ------------------------------------------------------------------------------

    def _num_seats_taken(self) -> int:
        """Requests that run on the route, or will when their KV has arrived."""
        exchanges = self._pool.exchanges.values()
        return len(self._members) + sum(exchange.target == self._route for exchange in exchanges)

    def _exchange_reserve(self) -> int:
        """Blocks that the next request in line for an exchange needs on a stage."""
        parked = {request.key for request in self._pool.parked}
        waiting = [e for key, e in self._pool.exchanges.items() if key in parked]
        if not waiting:
            return 0
        return self._pool.blocks.blocks_for(exchange_order(waiting)[0].request.num_tokens)

    def _queued_prefill(self, admits_new: bool) -> list[ChunkShape]:
        """What is left to prefill of those that have blocks, and of those that could get some."""
        work = [_rest(request) for request in self._members if request.num_unscheduled_tokens > 1]
        if self._route != self._pool.route:
            return work
        blocks = self._pool.blocks
        num_free = blocks.route_free(self._route)
        for request in chain(self._pool.preempted, self._pool.waiting if admits_new else ()):
            num_free -= blocks.blocks_for(request.num_tokens)
            if num_free < 0:
                break
            work.append(ChunkShape(0, request.num_tokens))
        return work

    def _is_ready(self, request: Request) -> bool:
        """True for a request of this route that the batch may contain."""
        if request.status is not RequestStatus.RUNNING:
            return False
        if self._is_ahead:
            return may_follow(request, self._config.max_model_len)
        return not request.is_in_flight or self._has_next_chunk(request)

    def _has_next_chunk(self, request: Request) -> bool:
        """True for a prompt in flight of which more may follow: every stage keeps the order.

        Not on the route of a former layout, which requests are to leave between two batches.
        """
        return request.num_pending_tokens == 0 and self._route == self._pool.route

    def _can_give_way(self, request: Request) -> bool:
        return request.status is RequestStatus.RUNNING and not request.is_in_flight

    # --- blocks ----------------------------------------------------------------------------------

    def _make_room(self, request: Request) -> bool:
        """Get the blocks for the next token of `request`, from others if there are none free."""
        blocks, num_tokens = self._pool.blocks, request.num_expected_tokens
        while not blocks.allocate(request, self._route, num_tokens):
            victim = self._choose_victim(request)
            if victim is None:
                return False
            self._pool.preempt(victim)
            self.preempted.append(victim)
        return True

    def _choose_victim(self, request: Request) -> Request | None:
        """Of the requests younger than `request`, the one with the least to compute again.

        Passed over are requests in flight, and those without blocks where they are needed. Among
        equals the youngest is chosen. If there is none, a parked request.
        """
        blocks = self._pool.blocks
        short = blocks.short_stages(request, self._route, request.num_tokens)

        def helps(candidate: Request) -> bool:
            return any(blocks.holds(candidate, worker_id) for worker_id in short)

        running = filter(self._can_give_way, self._pool.running.after(request))
        for candidates in (running, self._pool.parked):
            helpful = filter(helps, candidates)
            victim = min(helpful, key=lambda other: other.num_computed_tokens, default=None)
            if victim is not None:
                return victim
        return None

    # --- into the batch --------------------------------------------------------------------------

    @property
    def _is_full(self) -> bool:
        return self._budget == 0 or self._pacer.is_spent(self._prefill_cost)

    def _take_prefill(self, request: Request) -> None:
        """Put a chunk of `request` into the batch, as large as tokens and time allow."""
        chunk = _rest(request)
        num_tokens = min(self._budget, self._pacer.chunk_tokens(chunk, self._prefill_cost))
        taken = ChunkShape(chunk.num_prefix_tokens, num_tokens)
        self._prefill_cost -= self._pacer.model.marginal_cost(taken)
        self._take(request, num_tokens)

    def _take(self, request: Request, num_tokens: int) -> None:
        wants_token = num_tokens == request.num_unscheduled_tokens
        self.scheduled.append(
            ScheduledRequest(request, request.num_taken_tokens, num_tokens, wants_token)
        )
        self._budget -= num_tokens
        request.num_scheduled_tokens += num_tokens
        request.num_pending_tokens += wants_token


def _rest(request: Request) -> ChunkShape:
    """All that no batch has taken of a request."""
    return ChunkShape(request.num_taken_tokens, request.num_unscheduled_tokens)
