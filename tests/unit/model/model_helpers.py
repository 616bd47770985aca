"""A stage with memory of its own, and ways to run sequences through stages and runners."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from services.worker.kernels.cpu import CpuKernels
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.memory.cpu import CpuMemory
from services.worker.memory.pool import MemoryPool
from services.worker.model.batch import ForwardBatch, SequenceSlice, make_batch
from services.worker.model.checkpoint import Checkpoint
from services.worker.model.config import ModelConfig
from services.worker.model.layers.base import DecoderLayers
from services.worker.model.layers.cpu_transformers import CpuTransformersLayers
from services.worker.model.layers.factory import make_decoder_layers
from services.worker.model.loading import RunnerConfig
from services.worker.model.plan import ModelPlan
from services.worker.model.queues.base import DeviceQueue
from services.worker.model.runner import ModelRunner
from services.worker.model.stage import Stage
from shared.layout import Span
from tests.tiny_models import NUM_LAYERS

CHUNK_BYTES = 16 * 1024
BUDGET_BYTES = 8 * 1024**2
MAX_NUM_TOKENS = 256
BLOCK_SIZE = 16
WHOLE = Span(start=0, end=NUM_LAYERS)

LayersFactory = Callable[[ModelConfig, Any], DecoderLayers[Any]]


def served_layers(config: ModelConfig, kernels: CpuKernels | TorchKernels) -> DecoderLayers[Any]:
    """What a worker would use."""
    return make_decoder_layers(config, kernels, MAX_NUM_TOKENS)


def transformers_layers(config: ModelConfig, kernels: CpuKernels) -> DecoderLayers[Any]:
    """Hugging Face's layers, also where a worker has faster ones."""
    return CpuTransformersLayers(config, kernels)


@dataclass(frozen=True)
class LoadedStage:
    """A stage and the memory it lives in."""

    stage: Stage
    pool: MemoryPool
    memory: CpuMemory
    plan: ModelPlan


@contextmanager
def open_stage(
    directory: Path,
    kernels: CpuKernels | TorchKernels,
    span: Span = WHOLE,
    *,
    make_layers: LayersFactory = served_layers,
    budget_bytes: int = BUDGET_BYTES,
) -> Iterator[LoadedStage]:
    checkpoint = Checkpoint.open(directory)
    plan = ModelPlan(checkpoint.config, make_layers(checkpoint.config, kernels), kernels)
    memory = CpuMemory(budget_bytes, CHUNK_BYTES)
    pool = MemoryPool(memory)
    stage = Stage(plan, span, checkpoint, pool, kernels)
    for _ in stage.load(span):
        pass
    pool.grow_kv_evenly(range(span.start, span.end))
    yield LoadedStage(stage, pool, memory, plan)
    pool.check_integrity()
    pool.close()


@contextmanager
def open_runner(
    directory: Path,
    kernels: CpuKernels | TorchKernels,
    memory_bytes: int = BUDGET_BYTES,
    queue: DeviceQueue | None = None,
) -> Iterator[ModelRunner]:
    config = RunnerConfig(directory, memory_bytes, CHUNK_BYTES, MAX_NUM_TOKENS, None)
    runner = ModelRunner.load(config, kernels, queue)
    yield runner
    runner.pool.check_integrity()
    runner.pool.close()


def last_logits(runner: ModelRunner, slices: Sequence[SequenceSlice]) -> torch.Tensor:
    """Logits `[num_logits, vocab]` of the slices that want a token."""
    parts = [logits.clone() for logits in runner.logits(slices)]
    return torch.cat(parts) if parts else torch.empty(0, runner.config.vocab_size)


def run_route(route: Sequence[tuple[Stage, Span]], batch: ForwardBatch) -> torch.Tensor:
    """Logits `[num_tokens, vocab]` of every token of the batch, through the spans in a row."""
    with torch.inference_mode():
        hidden = route[0][0].embed(batch.token_ids)
        for stage, span in route:
            stage.forward(hidden, batch, span)
        return route[-1][0].logits(hidden, torch.arange(batch.token_ids.numel()))


def random_tokens(count: int, seed: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count,), generator=generator).tolist()


@dataclass
class PagedSequence:
    """A sequence that is computed piece by piece into blocks of its own."""

    token_ids: list[int]
    block_table: list[int]
    num_computed_tokens: int = 0

    @property
    def is_done(self) -> bool:
        return self.num_computed_tokens == len(self.token_ids)

    def take(self, num_tokens: int) -> SequenceSlice:
        """The next `num_tokens` tokens, or those that are left."""
        start = self.num_computed_tokens
        end = min(start + num_tokens, len(self.token_ids))
        self.num_computed_tokens = end
        return SequenceSlice(
            self.token_ids[start:end], start, self.block_table, end == len(self.token_ids)
        )


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


def whole_batch(token_ids: list[int], first_block: int = 0) -> ForwardBatch:
    """One sequence, all of it at once."""
    blocks = range(first_block, first_block + blocks_for(len(token_ids)))
    return make_batch([SequenceSlice(token_ids, 0, list(blocks), True)], BLOCK_SIZE)
