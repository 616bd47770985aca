"""How much work one microbatch takes, so that all microbatches of a pipeline last equally long.

A worker alone (one stage) takes all it can: then pacing sets no limit. On a pipeline of S stages
- the decodes are spread: a batch takes 1/S of the cost of all of them, those that waited longest
  first; what returns too large is cut down and the next one filled up, so they stay even;
- prefill is spread too: a batch takes a small part of the cost of all that is queued, so that one
  that admits a prompt lasts no longer than those around it. When a lot is queued, the parts are
  planned in rounds by the lookahead formulation (`microbatches.py`). A round sets how much a batch
  takes, not which request: prompts are taken in order, chunk behind chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from services.worker.engine.config import ChunkPolicy, SchedulerConfig
from services.worker.engine.cost_model import ChunkShape, CostModel
from services.worker.engine.microbatches import formulate
from services.worker.engine.request import Request

#: Requests are cut into pieces no smaller than this: each adds overhead, and saves little.
_MIN_PIECE_TOKENS = 16
#: What is queued is spread over so many batches for each stage. More make batches more even, but
#: prompts wait longer. In tests/unit/engine/test_engine_pipeline_pace.py stages wait for 5 % of the
#: time, against 23 % when prompts are taken whole.
_SPREAD = 6


class DecodeShare:
    """The decodes of one batch on a pipeline: an equal part of the cost of all of them."""

    def __init__(self, decodes: Sequence[Request], num_stages: int, model: CostModel) -> None:
        """Divide by `num_stages`.

        Args:
            decodes: all requests that decode on the route, in flight or not.
        """
        self.cost = 0.0
        self._num_stages = num_stages
        self._model = model
        self._limit = math.inf
        if num_stages > 1:
            total = sum(model.decode_cost(request.num_computed_tokens) for request in decodes)
            self._limit = total / num_stages * (1.0 - 1e-9)  # sums of floats differ a little

    def in_turn(self, ready: Sequence[Request]) -> list[Request]:
        """`ready`, oldest first, in the order in which they are to be tried.

        Where not all may come along those that waited longest go first. Who finds no block is
        passed over, so that it cannot keep the others from their turn.
        """
        if self._num_stages == 1:
            return list(ready)
        return sorted(ready, key=lambda request: request.last_step)

    @property
    def is_taken(self) -> bool:
        """True if the batch has its share."""
        return self.cost >= self._limit

    def take(self, request: Request) -> None:
        """Count a request that is in the batch."""
        self.cost += self._model.decode_cost(request.num_computed_tokens)


class PrefillPacer:
    """Remembers, for one route, how the prefill that is queued was divided."""

    def __init__(self, config: SchedulerConfig, model: CostModel, num_stages: int) -> None:
        self.model = model
        self._config = config
        self._num_stages = num_stages
        self._piece_tokens = min(
            _MIN_PIECE_TOKENS, config.min_prefill_tokens, config.max_num_batched_tokens
        )
        self._least_cost = self._cost_of_new(self._piece_tokens) / 2
        self._spread = _SPREAD * num_stages
        self._share = 0.0
        self._batch_cost = 0.0
        self._num_batches_left = 0

    @property
    def needs_round(self) -> bool:
        """True if `begin_round` should be told what is queued."""
        is_lookahead = self._config.chunk_policy is ChunkPolicy.LOOKAHEAD
        return is_lookahead and self._num_stages > 1 and self._num_batches_left == 0

    def begin_round(self, work: Sequence[ChunkShape]) -> None:
        """Divide the prefill that is queued: into parts of equal cost, if there is enough of it.

        Too few requests cannot fill the pipeline, however they are cut; too few tokens would be cut
        into pieces that do not use the device well. Then the next batch takes its share.
        """
        self._share = math.fsum(map(self.model.marginal_cost, work)) / self._spread
        num_tokens = sum(chunk.num_tokens for chunk in work)
        min_tokens = max(self._config.min_prefill_tokens, num_tokens // self._spread)
        if len(work) <= self._num_stages or num_tokens < self._spread * min_tokens:
            return
        max_tokens = self._config.max_num_batched_tokens
        batches = formulate(work, self.model, min_tokens, max_tokens)
        growth = 1.0
        if min_tokens >= max_tokens:  # enough for full batches: the fullest shall be just that
            growth = max_tokens / max(sum(c.num_tokens for c in batch) for batch in batches)
        self._num_batches_left = math.ceil(len(batches) / growth)
        costs = (self.model.marginal_cost(chunk.shape) for batch in batches for chunk in batch)
        # Batches that may hold but a few tokens can be smaller than any piece; a first one fits.
        self._batch_cost = max(math.fsum(costs) / len(batches) * growth, self._least_cost)

    def prefill_cost(self, decode_cost: float, *, kv_travels: bool) -> float:
        """What the prefill of the next batch may cost, in sums of `marginal_cost`.

        Args:
            decode_cost: cost of the decodes in the same batch.
            kv_travels: requests wait for their KV, which moves between batches.
        """
        cost = self._prefill_cost(decode_cost)
        if not kv_travels or self._config.exchange_prefill_tokens is None:
            return cost
        return min(cost, self._cost_of_new(self._config.exchange_prefill_tokens))

    def _prefill_cost(self, decode_cost: float) -> float:
        if self._num_stages == 1 or self._config.chunk_policy is ChunkPolicy.TOKEN_COUNT:
            return math.inf
        if self._num_batches_left > 0:
            return self._batch_cost
        full_batch = self._cost_of_new(self._config.max_num_batched_tokens) - decode_cost
        if self._config.chunk_policy is ChunkPolicy.LOOKAHEAD:
            return max(min(self._share, full_batch), self._cost_of_new(self._piece_tokens))
        return max(full_batch, self._cost_of_new(self._config.min_prefill_tokens))

    def is_spent(self, cost_left: float) -> bool:
        """True if another piece would come nowhere near `cost_left`."""
        return cost_left < self._least_cost

    def chunk_tokens(self, chunk: ChunkShape, cost_left: float) -> int:
        """How many tokens of `chunk` cost about `cost_left`, without pieces of no use."""
        if math.isinf(cost_left):
            return chunk.num_tokens
        num_tokens = self.model.chunk_tokens(chunk.num_prefix_tokens, cost_left)
        if num_tokens >= chunk.num_tokens - self._piece_tokens / 2:
            return chunk.num_tokens
        return min(chunk.num_tokens, max(self._piece_tokens, round(num_tokens)))

    def _cost_of_new(self, num_tokens: int) -> float:
        return self.model.marginal_cost(ChunkShape(0, num_tokens))

    def batch_made(self, *, has_prefill: bool) -> None:
        """Count a batch of the round; one without prefill ends it, for nothing is left."""
        self._num_batches_left = max(0, self._num_batches_left - 1) if has_prefill else 0
