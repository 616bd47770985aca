"""What `benchmarks.gpu` measures, on whatever device a loaded model computes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from services.worker.model.batch import SequenceSlice
from services.worker.model.checkpoint import EMBEDDING, tensor_shapes
from services.worker.model.config import ModelConfig
from services.worker.model.runner import ModelRunner
from services.worker.model.sampler import SamplingRow
from shared.layout import Span
from shared.sampling import SamplingParams

_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class DecodeFinding:
    """One token for each of `batch_size` requests of `context` tokens."""

    batch_size: int
    context: int
    seconds: float
    bytes_needed: int  # weights and KV, read once

    def share_of(self, bytes_per_second: float) -> float:
        """Time over the least time that memory of this bandwidth allows."""
        return self.seconds / (self.bytes_needed / bytes_per_second)


@dataclass(frozen=True, slots=True)
class PrefillFinding:
    """`num_prompts` prompts of `length` tokens in one batch."""

    num_prompts: int
    length: int
    seconds: float
    operations: float

    @property
    def tokens_per_second(self) -> float:
        return self.num_prompts * self.length / self.seconds


@dataclass(frozen=True, slots=True)
class DropFinding:
    """Half of the layers given up, until their memory is KV."""

    seconds: float
    dropped_bytes: int
    blocks_before: int
    blocks_after: int


def copy_rate(device: torch.device, nbytes: int, repetitions: int = 10) -> float:
    """Bytes read plus bytes written per second when a large tensor is copied."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / _best_seconds(lambda: target.copy_(source), device, repetitions)


def matmul_rate(
    device: torch.device, dtype: torch.dtype, size: int, repetitions: int = 10
) -> float:
    """Operations per second of a square matrix product."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: left @ right, device, repetitions)


def measure_decode(
    runner: ModelRunner, batch_size: int, context: int, repetitions: int = 20
) -> DecodeFinding:
    """Whole steps, from the batch on the host to its tokens there."""
    slices = _slices(runner, [(context - 1, 1)] * batch_size)
    rows = [SamplingRow(_GREEDY, context, (), ())] * batch_size
    runner.launch(slices, rows).result()
    times = [_seconds(lambda: runner.launch(slices, rows).result()) for _ in range(repetitions)]
    kv_bytes = runner.kv_block_bytes // runner.block_size * runner.config.num_layers
    return DecodeFinding(
        batch_size,
        context,
        statistics.median(times),
        _num_weights(runner.config) * runner.dtype.itemsize + batch_size * context * kv_bytes,
    )


def measure_prefill(
    runner: ModelRunner, num_prompts: int, length: int, repetitions: int = 3
) -> PrefillFinding:
    """Whole steps, as above."""
    slices = _slices(runner, [(0, length)] * num_prompts)
    rows = [SamplingRow(_GREEDY, length, (), ())] * num_prompts
    runner.launch(slices, rows).result()
    times = [_seconds(lambda: runner.launch(slices, rows).result()) for _ in range(repetitions)]
    config, tokens = runner.config, num_prompts * length
    head = config.vocab_size * config.hidden_size
    products = 2.0 * (tokens * (_num_weights(config) - head) + num_prompts * head)
    attention = 2.0 * num_prompts * length**2 * config.num_heads * config.head_dim
    operations = products + config.num_layers * attention
    return PrefillFinding(num_prompts, length, min(times), operations)


def measure_drop(runner: ModelRunner) -> DropFinding:
    """Give up the second half of the layers; there is no way back for this runner."""
    before, weights = runner.num_blocks, runner.pool.usage.weight_bytes
    half = Span(start=0, end=runner.config.num_layers // 2)
    runner.synchronize()

    def drop() -> None:
        runner.keep(half)
        runner.synchronize()

    seconds = _seconds(drop)
    dropped_bytes = weights - runner.pool.usage.weight_bytes
    return DropFinding(seconds, dropped_bytes, before, runner.num_blocks)


def _slices(runner: ModelRunner, sequences: list[tuple[int, int]]) -> list[SequenceSlice]:
    """Sequences of (tokens before, tokens of the batch), in blocks of their own."""
    slices, block = [], 0
    for start, length in sequences:
        count = -(-(start + length) // runner.block_size)
        slices.append(SequenceSlice([1] * length, start, range(block, block + count), True))
        block += count
    if block > runner.num_blocks:
        raise ValueError(f"{block} blocks are needed, there are {runner.num_blocks}")
    return slices


def _num_weights(config: ModelConfig) -> int:
    """Weights that a step reads: all but an embedding of its own, of which it needs few rows."""
    return sum(
        math.prod(shape)
        for name, shape in tensor_shapes(config)
        if name != EMBEDDING or config.tie_word_embeddings
    )


def _best_seconds(run: Callable[[], object], device: torch.device, repetitions: int) -> float:
    def measured() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    measured()
    return min(_seconds(measured) for _ in range(repetitions))


def _seconds(run: Callable[[], object]) -> float:
    began_at = time.perf_counter()
    run()
    return time.perf_counter() - began_at
