"""The model of a worker as the engine uses it: load once, then compute batch after batch.

Start-up, in this order: check that the budget holds the weights and a smallest KV cache, before
anything is loaded; load the weights; give all that is left to the KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from services.worker.kernels.cpu import CpuKernels
from services.worker.memory.cpu import CpuMemory
from services.worker.memory.pool import MemoryPool
from services.worker.memory.sizing import check_budget
from services.worker.model.batch import SequenceSlice, make_batch
from services.worker.model.checkpoint import Checkpoint
from services.worker.model.rotary import RotaryTable
from services.worker.model.sampler import SampledToken, SamplingRow, sample
from services.worker.model.stage import Stage, StagePlan
from shared.layout import Span

#: The least KV cache worth starting with: one request of this many tokens.
_MIN_KV_TOKENS = 512


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """What the runner needs of the worker's settings."""

    model_dir: Path
    memory_bytes: int
    chunk_bytes: int
    max_num_batched_tokens: int
    max_model_len: int | None


class ModelRunner:
    """One whole model on the CPU. Build with `load`; used by the engine thread only."""

    def __init__(
        self,
        stage: Stage,
        pool: MemoryPool,
        kernels: CpuKernels,
        num_blocks: int,
        max_model_len: int,
        checkpoint: Checkpoint,
    ) -> None:
        self._stage = stage
        self._kernels = kernels
        self.pool = pool
        self.num_blocks = num_blocks
        self.max_model_len = max_model_len
        self.config = checkpoint.config

    @property
    def block_size(self) -> int:
        return self._kernels.block_size

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one block over all the layers held."""
        return self._stage.kv_block_bytes * len(self.span)

    @property
    def span(self) -> Span:
        return self._stage.span

    @classmethod
    def load(cls, runner_config: RunnerConfig, kernels: CpuKernels) -> ModelRunner:
        """Load every layer and size the KV cache.

        Raises:
            ConfigError: the checkpoint or the budget cannot work; one sentence.
        """
        log = structlog.get_logger(component="model")
        checkpoint = Checkpoint.open(runner_config.model_dir)
        config = checkpoint.config
        span = Span(start=0, end=config.num_layers)
        plan = StagePlan(config, span, kernels)
        min_blocks = -(-min(_MIN_KV_TOKENS, config.max_model_len) // kernels.block_size)
        check_budget(
            runner_config.memory_bytes,
            [layout.nbytes for layout in plan.layouts.values()],
            [plan.kv_block_bytes] * len(span),
            min_blocks,
            runner_config.chunk_bytes,
        )
        pool = MemoryPool(CpuMemory(runner_config.memory_bytes, runner_config.chunk_bytes))
        limit = min(runner_config.max_model_len or config.max_model_len, config.max_model_len)
        # All the budget as KV bounds the positions that can occur, now and after any drop.
        rotary = RotaryTable(config, limit)
        stage = Stage(plan, checkpoint, pool, kernels, rotary, runner_config.max_num_batched_tokens)
        for name in stage.load():
            log.debug("loaded", part=name)
        num_blocks = pool.grow_kv_evenly(plan.layers)
        max_model_len = min(limit, num_blocks * kernels.block_size)
        log.info(
            "model loaded",
            layers=len(span),
            weight_bytes=pool.usage.weight_bytes,
            kv_tokens=num_blocks * kernels.block_size,
            max_model_len=max_model_len,
        )
        return cls(stage, pool, kernels, num_blocks, max_model_len, checkpoint)

    def run(
        self, slices: Sequence[SequenceSlice], rows: Sequence[SamplingRow]
    ) -> list[SampledToken]:
        """Compute a batch; one token for each slice that wants one, in their order."""
        logits = self.logits(slices)
        return sample(logits, rows) if rows else []

    def logits(self, slices: Sequence[SequenceSlice]) -> torch.Tensor:
        """Compute a batch; logits `[num_logits, vocab]` of the slices that want a token."""
        batch = make_batch(slices, self.block_size)
        with torch.inference_mode():
            hidden = self._stage.forward(self._stage.embed(batch.token_ids), batch)
            return self._stage.logits(hidden, batch.logits_rows)

    def close(self) -> None:
        """Give the memory back; nothing may be computed afterwards."""
        self.pool.close()
        self._kernels.close()
