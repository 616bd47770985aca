"""Cuts queued prefill work into microbatches of equal cost, so that a pipeline has no bubbles.

The lookahead formulation of the KunServe paper (section 4.3): all queued tokens are one batch
first; batches are split into two halves of equal cost, which may cut a request, until they would be
too small to use the device well.

    | r0 r0 r0 r0 r0 r0 | r1 r1 | r2 r2 r2 r2 r2 |          one batch, cost 16
    | r0 r0 r0 r0 r0 . . . | . r0 | r1 r1 | r2 r2 ...|      cost 8 + 8
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from services.worker.engine.cost_model import ChunkShape, CostModel


class PrefillChunk(NamedTuple):
    """`num_tokens` tokens of `work[request_index]`, after its first `num_prefix_tokens`."""

    request_index: int
    num_prefix_tokens: int
    num_tokens: int

    @property
    def shape(self) -> ChunkShape:
        """What it costs depends on this."""
        return ChunkShape(self.num_prefix_tokens, self.num_tokens)


Microbatch = tuple[PrefillChunk, ...]


def formulate(
    work: Sequence[ChunkShape], model: CostModel, min_tokens: int, max_tokens: int
) -> tuple[Microbatch, ...]:
    """Split the tokens of all requests into microbatches of about equal cost, in order.

    All batches are split equally often, for only then their costs are equal.

    Args:
        work: what each request has to compute, in the order in which requests are served.
        min_tokens: batches have as many tokens on average, if there are so many. Fewer than that
            has only a batch whose tokens are dear, behind a long prefix.
        max_tokens: no batch has more, even if that makes the others small.

    Returns:
        Batches in order; the chunks of a request are in order and join without gaps.
    """
    chunks = tuple(PrefillChunk(i, *shape) for i, shape in enumerate(work) if shape.num_tokens > 0)
    if not chunks:
        return ()
    batches, num_tokens = [chunks], _num_tokens(chunks)
    while (
        num_tokens >= 2 * min_tokens * len(batches)
        or max(_num_tokens(batch) for batch in batches) > max_tokens
    ):
        batches = [half for batch in batches for half in split(batch, model) if half]
    return tuple(batches)


def batch_cost(batch: Microbatch, model: CostModel) -> float:
    """Predicted seconds of one microbatch."""
    return model.batch_cost(chunk.shape for chunk in batch)


def split(batch: Microbatch, model: CostModel) -> tuple[Microbatch, Microbatch]:
    """Cut `batch` where the costs of the two halves differ least; may cut inside a request.

    Neither half is empty, unless the batch is a single token.
    """
    if _num_tokens(batch) < 2:
        return batch, ()
    costs = [model.marginal_cost(chunk.shape) for chunk in batch]
    total, before, position = sum(costs), 0.0, 0
    while position < len(batch) - 1 and before + costs[position] <= total / 2:
        before += costs[position]
        position += 1
    chunk, after = batch[position], math.fsum(costs[position + 1 :])
    floor = int(min(model.even_tokens(chunk.shape, after - before), chunk.num_tokens))
    candidates = {0, 1, floor, floor + 1, chunk.num_tokens - 1, chunk.num_tokens}

    def imbalance(num_first: int) -> float:
        head, tail = chunk.shape.cut(num_first)
        first = before + (model.marginal_cost(head) if head.num_tokens else 0.0)
        second = after + (model.marginal_cost(tail) if tail.num_tokens else 0.0)
        return abs(first - second)

    least = 1 if position == 0 else 0  # neither half may be empty
    most = chunk.num_tokens - 1 if position == len(batch) - 1 else chunk.num_tokens
    valid = sorted(n for n in candidates if least <= n <= most)
    return _cut(batch, position, min(valid, key=imbalance))


def _cut(batch: Microbatch, position: int, num_first: int) -> tuple[Microbatch, Microbatch]:
    """Everything before chunk `position` and its first tokens; the rest."""
    chunk = batch[position]
    head, tail = (PrefillChunk(chunk.request_index, *shape) for shape in chunk.shape.cut(num_first))
    first = (*batch[:position], *((head,) if head.num_tokens else ()))
    second = (*((tail,) if tail.num_tokens else ()), *batch[position + 1 :])
    return first, second


def _num_tokens(batch: Microbatch) -> int:
    return sum(chunk.num_tokens for chunk in batch)
