"""Continuous batching: which tokens of which requests the next batch computes.

One principle, vLLM's: a request has `num_tokens` and `num_computed_tokens`, and every batch lets
the latter catch up. Prefill in chunks, decode, resuming after a preemption and replaying another
worker's request are all the same thing.

      add                      schedule                          update_from_output
    ------> waiting --admit--> running --batch--> in flight --tokens--> running ... finished
               (whole prompt fits)  |  ^
                            preempt v  | resume, before anybody who waits
                                 preempted

How a batch is filled, who is admitted and who must give way is told in `batch_builder.py`; how
requests change their route, in `relocation.py`.

A batch is made for one route. As many batches of a route may be in flight as it has stages. The
chunks of a prompt may be in several, one behind the other; who waits for a token is in no other
batch. With one stage there may be a second batch, which may contain the requests of the first
(`overlap.py`). Where requests of several routes are here, as during a restore, the route that has
waited longest for a batch is served first.
`num_computed_tokens` advances when the batch returns, not when it is scheduled: then it always says
what the KV cache holds, and a batch that failed leaves nothing to roll back. Blocks of a request in
flight are freed when its last batch returns, never earlier, because the batch still writes to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum, auto

from services.worker.engine.batch_builder import BatchBuilder
from services.worker.engine.block_manager import BlockManager
from services.worker.engine.config import SchedulerConfig
from services.worker.engine.cost_model import TOKEN_COUNT, CostModel
from services.worker.engine.group_blocks import GroupBlocks
from services.worker.engine.intake import IntakeState, check_request
from services.worker.engine.lanes import Lanes
from services.worker.engine.outputs import (
    AddResult,
    SchedulerLoad,
    SchedulerOutput,
    StepResult,
)
from services.worker.engine.relocation import Relocation
from services.worker.engine.request import Request, RequestKey, RequestStatus
from services.worker.engine.request_pool import RequestPool
from services.worker.engine.routes import REPLICA, Route, WorkerId
from services.worker.engine.shrinking import (
    ShrinkError,
    ShrinkPlan,
    ShrinkResult,
    apply_shrink,
    plan_shrink,
)
from services.worker.engine.stopping import finish_reason
from shared.errors import ConfigError
from shared.messages import FinishReason, GenerateStatus


class PauseState(Enum):
    """How much `schedule` may do; any state may follow any other."""

    RUNNING = auto()
    NO_NEW = auto()  # running and preempted requests go on, waiting ones stay
    STOPPED = auto()  # no batch is made; requests in flight still return


class Scheduler:
    """Owns every request of an engine from `add` to its end, and the blocks they hold.

    Not thread-safe: the engine thread calls it. See the module's text for the policy.

    Attributes:
        blocks: the blocks of this worker, those granted by others, and those granted to others.
        relocation: moves requests between routes.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        block_manager: BlockManager,
        route: Route = REPLICA,
        cost_model: CostModel = TOKEN_COUNT,
    ) -> None:
        """Start with no requests.

        Args:
            route: the first one, of which this worker is the leader.
            cost_model: of one stage; only ratios matter, so any stage will do.
        """
        if block_manager.blocks_for(config.max_model_len) > block_manager.num_blocks:
            raise ConfigError(
                f"the KV cache holds {block_manager.num_blocks * block_manager.block_size} tokens,"
                f" too few for one request of max_model_len {config.max_model_len}"
            )
        self.blocks = GroupBlocks(block_manager, route.leader)
        self._config = config
        self._worker_id = route.leader
        self._pool = RequestPool(self.blocks, route)
        self.relocation = Relocation(self._pool, route.leader)
        self._lanes = Lanes(config, cost_model)
        self._step = 0
        self._pause_state = PauseState.RUNNING
        self._intake_state = IntakeState.OPEN

    # --- what is there ---------------------------------------------------------------------------

    @property
    def requests(self) -> Mapping[RequestKey, Request]:
        """All unfinished requests; empty when the engine has nothing to do."""
        return self._pool.requests

    @property
    def num_batches_in_flight(self) -> int:
        """Batches scheduled and not returned; 0 at a batch boundary."""
        return self._lanes.num_batches_in_flight

    def load(self) -> SchedulerLoad:
        """The figures that a LoadReport carries; `requests_waiting` includes the preempted."""
        pool = self._pool
        num_blocks = self.blocks.route_capacity(pool.route)
        return SchedulerLoad(
            kv_blocks_total=num_blocks,
            kv_blocks_used=num_blocks - self.blocks.route_free(pool.route),
            requests_running=len(pool.running) + len(pool.parked) + len(pool.exchanging),
            requests_waiting=len(pool.waiting) + len(pool.preempted),
            waiting_blocks=pool.queued_blocks,
            num_preemptions=pool.num_preemptions,
            engine_steps=self._step,
        )

    def check_integrity(self) -> None:
        """Raise BlockIntegrityError unless every block is free or has exactly one owner."""
        self._pool.check_integrity()

    # --- requests in and out ---------------------------------------------------------------------

    def add(self, request: Request) -> AddResult:
        """Queue a new request, or say why not.

        A request that is already here (same id and attempt) is ACCEPTED again and nothing happens.
        A replay that has already reached its end is INVALID: there is nothing to generate.
        """
        if request.key in self._pool.requests:
            return AddResult(GenerateStatus.ACCEPTED)
        result = check_request(request, self._intake_state, self._config, self._pool.waiting)
        if result.status is GenerateStatus.ACCEPTED:
            self._pool.add(request)
        return result

    def cancel(self, request_id: str, attempt: int) -> bool:
        """End a request that nobody wants any more; no StepResult will mention it again.

        Its blocks are free on return, or, while batches in flight contain it, as soon as the last
        of them returns. Returns False for a request that is not here.
        """
        request = self._pool.requests.get(RequestKey(request_id, attempt))
        if request is None:
            return False
        self._pool.end(request, FinishReason.ABORT)
        return True

    def pause(self, state: PauseState) -> None:
        """Restrict `schedule` from now on. With STOPPED, wait until no batch is in flight."""
        self._pause_state = state

    def drain(self) -> None:
        """Refuse new requests from now on; those accepted are finished."""
        self._intake_state = IntakeState.DRAINING

    # --- the layout changes ----------------------------------------------------------------------

    def plan_shrink(self, targets: Mapping[WorkerId, int]) -> ShrinkPlan:
        """What it takes that requests of this scheduler use `targets` blocks at most, by worker.

        Raises:
            ShrinkError: that is more than there is, or too few for one request.
        """
        return plan_shrink(self._pool, targets, self._config.max_model_len)

    def shrink(self, plan: ShrinkPlan) -> ShrinkResult:
        """Preempt and shrink as planned.

        Raises:
            ShrinkError: a batch is in flight, or the plan is out of date.
        """
        if self.num_batches_in_flight:
            raise ShrinkError("blocks cannot be taken away while a batch is in flight")
        return apply_shrink(self._pool, plan, self._worker_id)

    def lose_worker(self, worker_id: WorkerId) -> list[Request]:
        """Forget all requests with KV on a worker that is gone, and the batches that need it.

        Returns those that somebody still wants. Requests whose KV was only to travel there are
        computed again.
        """
        self._lanes.lose(worker_id)
        requests = self._pool.requests.values()
        lost = [r for r in requests if r.route is not None and worker_id in r.route.worker_ids]
        wanted = self._end(lost)
        for exchange in list(self._pool.exchanges.values()):
            if worker_id in exchange.target.worker_ids:
                self.relocation.give_up(exchange.request)
        self.blocks.forget_worker(worker_id)
        return wanted

    def lose_all(self) -> list[Request]:
        """Forget all requests, those without KV too, and every batch in flight.

        Returns those that somebody still wants.
        """
        self._lanes.lose()
        return self._end(list(self._pool.requests.values()))

    def _end(self, requests: Sequence[Request]) -> list[Request]:
        """End requests that nobody can go on with; returns those that somebody still wants."""
        wanted = [request for request in requests if request.status is not RequestStatus.ENDING]
        for request in requests:
            self._pool.end(request, FinishReason.ERROR)
        return wanted

    # --- a step ----------------------------------------------------------------------------------

    def schedule(self, now: float) -> SchedulerOutput:
        """Make the next batch; empty if there is nothing to do or everything is in flight.

        Args:
            now: seconds on the clock of `Request.arrival_seconds`.
        """
        if self._pause_state is PauseState.STOPPED:
            return SchedulerOutput(0, ())
        for lane in self._lanes.by_turn(self._pool):
            builder = BatchBuilder(self._config, self._pool, lane)
            builder.build(now, admits_new=self._pause_state is PauseState.RUNNING)
            if builder.scheduled:
                self._step += 1
                output = builder.output(self._step)
                self._lanes.started(lane, output)
                return output
        return SchedulerOutput(0, ())

    # --- a batch returns -------------------------------------------------------------------------

    def update_from_output(
        self, output: SchedulerOutput, sampled_token_ids: Sequence[int]
    ) -> list[StepResult]:
        """Take in the result of a batch; with several stages they may return in any order.

        Args:
            sampled_token_ids: one token for each of `output.sampled_requests`, in that order.

        Returns:
            One result per request that got a token and had not ended before, in the batch's order.
        """
        if len(sampled_token_ids) != len(output.sampled_requests):
            raise ValueError(
                f"{len(sampled_token_ids)} tokens for {len(output.sampled_requests)} requests"
            )
        self.blocks.releases.confirm(output.released)
        tokens = iter(sampled_token_ids)
        self._lanes.returned(output)
        results = []
        for item in output.scheduled:
            request = item.request
            token_id = next(tokens) if item.wants_token else None
            if request.status is RequestStatus.ENDING:
                self._pool.end(request, FinishReason.ABORT)
                continue
            request.num_computed_tokens += item.num_scheduled_tokens
            if token_id is not None:
                results.append(self._append_token(request, token_id))
        return results

    def fail_batch(self, output: SchedulerOutput, error: str) -> list[StepResult]:
        """End every request of a batch that could not be computed; the engine goes on.

        Args:
            error: a sentence for the clients.
        """
        self._lanes.returned(output)
        return [
            StepResult(request, request.num_output_tokens, (), FinishReason.ERROR, error=error)
            for request in self._end([item.request for item in output.scheduled])
        ]

    def _append_token(self, request: Request, token_id: int) -> StepResult:
        index = request.num_output_tokens
        request.output_token_ids.append(token_id)
        reason = finish_reason(request, self._config.max_model_len)
        if reason is not None:
            self._pool.end(request, reason)
        stop_token_id = token_id if reason is FinishReason.STOP else None
        return StepResult(request, index, (token_id,), reason, stop_token_id)
