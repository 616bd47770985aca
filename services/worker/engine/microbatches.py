"""Cuts queued prefill work into microbatches of equal cost, so that a pipeline has no bubbles.

The lookahead formulation of the KunServe paper (section 4.3): all queued tokens are one batch
first; a batch is split into two halves of equal cost, which may cut a request, until its halves
would be too small to use the device well.

    | r0 r0 r0 r0 r0 r0 | r1 r1 | r2 r2 r2 r2 r2 |          one batch, cost 16
    | r0 r0 r0 r0 r0 . . . | . r0 | r1 r1 | r2 r2 ...|      cost 8 + 8
"""

from __future__ import annotations

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
    work: Sequence[ChunkShape], model: CostModel, min_tokens: int
) -> tuple[Microbatch, ...]:
    """Split the tokens of all requests into microbatches of about equal cost, in order.

    Args:
        work: what each request has to compute, in the order in which requests are served.
        min_tokens: a batch is split as long as both halves have as many tokens.

    Returns:
        Batches in order; the chunks of a request are in order and join without gaps.
    """
    chunks = tuple(PrefillChunk(i, *shape) for i, shape in enumerate(work) if shape.num_tokens > 0)
    return tuple(_halve(chunks, model, min_tokens)) if chunks else ()


def batch_cost(batch: Microbatch, model: CostModel) -> float:
    """Predicted seconds of one microbatch."""
    return model.batch_cost(chunk.shape for chunk in batch)


def _halve(batch: Microbatch, model: CostModel, min_tokens: int) -> list[Microbatch]:
    if _num_tokens(batch) < 2 * min_tokens:
        return [batch]
    first, second = split(batch, model)
    if min(_num_tokens(first), _num_tokens(second)) < min_tokens:
        return [batch]
    return [*_halve(first, model, min_tokens), *_halve(second, model, min_tokens)]


def split(batch: Microbatch, model: CostModel) -> tuple[Microbatch, Microbatch]:
    """Cut `batch` where the costs of the two halves differ least; may cut inside a request."""
    costs = [model.marginal_cost(chunk.shape) for chunk in batch]
    total, before, position = sum(costs), 0.0, 0
    while position < len(batch) - 1 and before + costs[position] <= total / 2:
        before += costs[position]
        position += 1
    chunk = batch[position]
    # A cut inside this chunk makes one chunk more, which costs `cut_cost`.
    cut_cost = model.gamma - model.lam
    num_tokens = model.chunk_tokens(chunk.num_prefix_tokens, (total + cut_cost) / 2 - before)
    # Not before it, if nothing is left of it, and so on: the best of the few whole numbers around.
    nearest = int(min(num_tokens, chunk.num_tokens))
    candidates = {0, nearest, min(nearest + 1, chunk.num_tokens), chunk.num_tokens}

    def imbalance(num_first: int) -> float:
        shape = ChunkShape(chunk.num_prefix_tokens, num_first)
        first = before + (model.marginal_cost(shape) if num_first else 0.0)
        whole = total + (cut_cost if 0 < num_first < chunk.num_tokens else 0.0)
        return abs(2 * first - whole)

    return _cut(batch, position, min(sorted(candidates), key=imbalance))


def _cut(batch: Microbatch, position: int, num_first: int) -> tuple[Microbatch, Microbatch]:
    """Everything before chunk `position` and its first tokens; the rest."""
    request_index, num_prefix_tokens, num_tokens = batch[position]
    head = PrefillChunk(request_index, num_prefix_tokens, num_first)
    tail = PrefillChunk(request_index, num_prefix_tokens + num_first, num_tokens - num_first)
    first = (*batch[:position], *((head,) if head.num_tokens else ()))
    second = (*((tail,) if tail.num_tokens else ()), *batch[position + 1 :])
    return first, second


def _num_tokens(batch: Microbatch) -> int:
    return sum(chunk.num_tokens for chunk in batch)
