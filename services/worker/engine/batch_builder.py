"""Fills one batch: who is served, who is admitted, who must give way.

A batch is filled in three passes within `max_num_batched_tokens`:
1. running requests that decode, one token each, oldest first (a long prefill, also one that
   resumes, never holds up the tokens of the others);
2. running requests that are not prefilled yet, oldest first;
3. admissions, first come, first served. A request is admitted only if blocks for *all* its present
   tokens are free, and gets them at once, so half-prefilled requests cannot starve each other; a
   watermark stays free so that running requests can grow. The head of the queue is never overtaken.

Progress. Only a request older than its victim may preempt it, so nothing can take the blocks of the
oldest running request, which therefore finishes; then the next is the oldest. A request for which
no younger one can give way waits with its blocks for the next batch: that wastes no computed token.
A step that preempts admits nobody, preempted requests resume before new ones start, and they must
leave the larger `recovery_watermark` free.
"""

from __future__ import annotations

from services.worker.engine.config import SchedulerConfig
from services.worker.engine.outputs import ScheduledRequest
from services.worker.engine.request import Request, RequestStatus
from services.worker.engine.request_pool import RequestPool


class BatchBuilder:
    """Makes one batch; the scheduler uses a fresh one for each.

    Attributes:
        scheduled: the batch so far.
        preempted: requests that lost their blocks for it.
    """

    def __init__(self, config: SchedulerConfig, pool: RequestPool) -> None:
        self.scheduled: list[ScheduledRequest] = []
        self.preempted: list[Request] = []
        self._config = config
        self._pool = pool
        self._budget = config.max_num_batched_tokens

    def build(self, now: float, *, admits_new: bool) -> None:
        """Run the three passes. Without `admits_new`, only preempted requests get seats."""
        self._schedule_decodes()
        self._schedule_prefills()
        if not self.preempted:
            self._admit(now, admits_new)

    def _schedule_decodes(self) -> None:
        """First pass. Whoever gets no block for its next token is left for a later batch."""
        for request in list(self._pool.running):
            if not _is_ready(request) or request.num_uncomputed_tokens > 1:
                continue
            if self._make_room(request):
                self._take(request)

    def _schedule_prefills(self) -> None:
        """Second pass."""
        for request in self._pool.running:
            if self._budget == 0:
                return
            if _is_ready(request) and request.num_uncomputed_tokens > 1:
                self._take(request)

    def _admit(self, now: float, admits_new: bool) -> None:
        """Third pass: give seats and blocks to those who wait, in order, while both last."""
        while self._budget > 0 and len(self._pool.running) < self._config.max_num_seqs:
            request = self._next_admission(admits_new)
            if request is None:
                return
            self._pool.admit(request, now)
            self._take(request)

    def _next_admission(self, admits_new: bool) -> Request | None:
        """The head of the queue if its tokens fit; preempted requests go before waiting ones."""
        pool, num_blocks = self._pool, self._pool.blocks.num_blocks
        if pool.preempted:
            request = pool.preempted[0]
            spare_blocks = self._config.recovery_watermark_blocks(num_blocks)
        elif pool.waiting and admits_new:
            request = pool.waiting[0]
            spare_blocks = self._config.watermark_blocks(num_blocks)
        else:
            return None
        if not pool.running:
            spare_blocks = 0  # nobody could grow into it, and a request of any size must start
        fits = pool.blocks.can_allocate(request, request.num_tokens, spare_blocks)
        return request if fits else None

    def _make_room(self, request: Request) -> bool:
        """Get the block for the next token of `request`, from a younger one if none is free."""
        while not self._pool.blocks.allocate(request, request.num_tokens):
            victim = self._choose_victim(request)
            if victim is None:
                return False
            self._pool.preempt(victim)
            self.preempted.append(victim)
        return True

    def _choose_victim(self, request: Request) -> Request | None:
        """Of the requests younger than `request`, the one with the least to compute again.

        Passed over are requests in flight. Among equals the youngest is chosen.
        """
        candidates = filter(_is_ready, self._pool.running.after(request))
        return min(candidates, key=lambda candidate: candidate.num_computed_tokens, default=None)

    def _take(self, request: Request) -> None:
        """Put as many uncomputed tokens of `request` into the batch as the budget allows."""
        num_uncomputed = request.num_uncomputed_tokens
        num_tokens = min(self._budget, num_uncomputed)
        self._budget -= num_tokens
        request.num_scheduled_tokens = num_tokens
        self.scheduled.append(
            ScheduledRequest(
                request,
                request.num_computed_tokens,
                num_tokens,
                wants_token=num_tokens == num_uncomputed,
            )
        )


def _is_ready(request: Request) -> bool:
    """True for a running request that the batch may contain."""
    return request.status is RequestStatus.RUNNING and not request.is_in_flight
