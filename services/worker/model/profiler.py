"""Measures what batches of a loaded model cost; called once at start-up, before any request.

A few batches of typical shapes run on KV blocks that nobody uses yet, over as many layers as fit
into the time allowed. What counts is the fastest of several runs: other work on the machine can
only make a run slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from services.worker.engine.cost_model import ChunkShape, CostSample, fit_cost_model
from services.worker.engine.profile import LinearCost, ModelProfile
from services.worker.model.batch import ForwardBatch, SequenceSlice
from services.worker.model.runner import ModelRunner
from services.worker.model.sampler import SamplingRow
from shared.layout import Span
from shared.sampling import SamplingParams

#: Time for all runs of all shapes, about.
_BUDGET_SECONDS = 2.0
_RUNS = 3
#: Layers that are measured at least, so that one does not stay in the processor's cache.
_MIN_LAYERS = 4
_FEW_ROWS, _MANY_ROWS = 1, 32

_DECODE = ChunkShape(128, 1)
_SHAPES: tuple[tuple[ChunkShape, ...], ...] = (
    (_DECODE,),
    (_DECODE,) * 8,
    (_DECODE,) * 16,
    (_DECODE,) * 32,
    (ChunkShape(1024, 1),) * 8,
    (ChunkShape(0, 16),),
    (ChunkShape(0, 64),),
    (ChunkShape(0, 32),) * 4,
    (ChunkShape(0, 256),),
    (ChunkShape(1024, 64),),
    (*(_DECODE,) * 16, ChunkShape(0, 64)),
)


def profile_model(runner: ModelRunner, max_num_batched_tokens: int) -> ModelProfile:
    """Run batches and fit costs to their times; the content of free KV blocks changes.

    Raises:
        CostModelError: the times show no cost of tokens.
    """
    shapes = [_fitting(shape, runner, max_num_batched_tokens) for shape in _SHAPES]
    batches = [_batch(shape, runner) for shape in shapes]
    span = _span(runner, batches)
    seconds = _fastest(
        [lambda batch=batch: _forward(runner, batch, span) for batch in batches]  # type: ignore[misc]
    )
    samples = [
        CostSample(batch.chunks, one / len(span))
        for batch, one in zip(batches, seconds, strict=True)
    ]
    layer = fit_cost_model(samples)
    embedding, head = _measure_ends(runner, max_num_batched_tokens)
    return ModelProfile(layer, embedding, head, layer.prediction_error(samples))


def _fitting(
    shape: Sequence[ChunkShape], runner: ModelRunner, max_num_batched_tokens: int
) -> tuple[ChunkShape, ...]:
    """`shape`, cut down to what the worker can run at once."""
    fitting, budget = [], max_num_batched_tokens
    for prefix, num_tokens in shape[:max_num_batched_tokens]:
        taken = min(num_tokens, budget, runner.max_model_len)
        if taken:
            fitting.append(ChunkShape(min(prefix, runner.max_model_len - taken), taken))
            budget -= taken
    return tuple(fitting)


def _batch(chunks: Sequence[ChunkShape], runner: ModelRunner) -> ForwardBatch:
    """A batch on free blocks; where they are too few, sequences share some."""
    slices, position = [], 0
    for start, num_tokens in chunks:
        count = -(-(start + num_tokens) // runner.block_size)
        blocks = [index % runner.num_blocks for index in range(position, position + count)]
        slices.append(SequenceSlice([0] * num_tokens, start, blocks, True))
        position += count
    return runner.make_batch(slices)


def _span(runner: ModelRunner, batches: Sequence[ForwardBatch]) -> Span:
    """The first layers, so many that all runs end in time."""
    smallest = min(batches, key=lambda batch: batch.token_ids.numel())
    whole = Span(start=0, end=runner.config.num_layers)
    _forward(runner, smallest, whole)  # everything is touched once
    seconds = _seconds(lambda: _forward(runner, smallest, whole))
    num_tokens = sum(max(8, batch.token_ids.numel()) for batch in batches)
    expected_seconds = _RUNS * seconds * num_tokens / 8
    share = min(1.0, _BUDGET_SECONDS / expected_seconds)
    return Span(start=0, end=max(min(_MIN_LAYERS, len(whole)), round(share * len(whole))))


def _forward(runner: ModelRunner, batch: ForwardBatch, span: Span) -> None:
    runner.forward(batch, runner.embed(batch), span)
    runner.synchronize()


def _embed(runner: ModelRunner, batch: ForwardBatch) -> None:
    runner.embed(batch)
    runner.synchronize()


def _sample(
    runner: ModelRunner,
    hidden: torch.Tensor,  # [num_tokens, hidden_size]
    batch: ForwardBatch,
    rows: Sequence[SamplingRow],
) -> None:
    runner.sample(hidden, batch, rows).result()


def _measure_ends(
    runner: ModelRunner, max_num_batched_tokens: int
) -> tuple[LinearCost, LinearCost]:
    """Costs of embedding and head."""
    many = max(2, min(_MANY_ROWS, max_num_batched_tokens))
    params = SamplingParams(temperature=0.0)
    runs: list[Callable[[], object]] = []
    for num_rows in (_FEW_ROWS, many):
        batch = _batch([ChunkShape(0, 1)] * num_rows, runner)
        hidden = runner.embed(batch)
        rows = [SamplingRow(params, 1, (0,), ())] * num_rows
        runs += [partial(_embed, runner, batch), partial(_sample, runner, hidden, batch, rows)]
    few_embedding, few_head, many_embedding, many_head = _fastest(runs)
    return (
        LinearCost.through((_FEW_ROWS, few_embedding), (many, many_embedding)),
        LinearCost.through((_FEW_ROWS, few_head), (many, many_head)),
    )


def _fastest(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of each, the least of several tries; all in turn, so that they share their luck."""
    tries = [[_seconds(run) for run in runs] for _ in range(_RUNS)]
    return [min(column) for column in zip(*tries, strict=True)]


def _seconds(run: Callable[[], object]) -> float:
    began_at = time.perf_counter()
    run()
    return time.perf_counter() - began_at
