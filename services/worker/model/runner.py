"""The model of a worker as the engine uses it: load once, then compute batch after batch.

Start-up, in this order: check that the budget holds the weights and a smallest KV cache, before
anything is loaded; load the weights; give all that is left to the KV cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from services.worker.engine.block_manager import BlockMove
from services.worker.engine.profile import ModelProfile
from services.worker.kernels.base import Kernels
from services.worker.kernels.cpu import CpuKernels
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.memory.factory import make_memory
from services.worker.memory.pool import MemoryPool
from services.worker.memory.sizing import most_blocks
from services.worker.meter import EngineMeter
from services.worker.model.arena_source import ArenaSource
from services.worker.model.batch import ForwardBatch, SequenceSlice, make_batch
from services.worker.model.checkpoint import Checkpoint, WeightSource
from services.worker.model.device_sampler import sample_on_device
from services.worker.model.layers.factory import make_decoder_layers
from services.worker.model.plan import ModelPlan, PartBytes
from services.worker.model.sampler import SampledToken, SamplingRow, sample
from services.worker.model.stage import Stage
from services.worker.work_pacer import BatchActivity
from shared.layout import Span

#: Rows of logits that are in memory at once; enough to be bound by arithmetic.
_LOGITS_ROWS = 64


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """What the runner needs of the worker's settings."""

    model_dir: Path
    memory_bytes: int
    chunk_bytes: int
    max_num_batched_tokens: int
    max_model_len: int | None


class ModelRunner:
    """The layers of a model that a worker serves, on its device; at first all of them.

    Build with `load`; used by the engine thread only.
    """

    def __init__(
        self,
        plan: ModelPlan,
        stage: Stage,
        pool: MemoryPool,
        kernels: Kernels,
        max_model_len: int | None,
    ) -> None:
        """Take a loaded stage whose KV cache has its size; `max_model_len` restricts it further."""
        self.pool = pool
        self.config = plan.config
        self._plan = plan
        self._stage = stage
        self._span = stage.span
        self._kernels = kernels
        self._sample = sample if kernels.device.type == "cpu" else sample_on_device
        limit = min(max_model_len or self.config.max_model_len, self.config.max_model_len)
        #: Prompt plus output tokens of the longest request; stays when the KV cache grows.
        self.max_model_len = min(limit, self.num_blocks * self.block_size)
        self.meter = EngineMeter()
        self.activity = BatchActivity()
        #: What batches cost here, once it is measured.
        self.profile: ModelProfile | None = None

    @classmethod
    def load(cls, runner_config: RunnerConfig, kernels: CpuKernels | TorchKernels) -> ModelRunner:
        """Load every layer and give what is left of the budget to the KV cache.

        Raises:
            ConfigError: the checkpoint or the budget cannot work; one sentence.
        """
        return cls.load_from(Checkpoint.open(runner_config.model_dir), runner_config, kernels)

    @classmethod
    def load_from(
        cls,
        weights: WeightSource,
        runner_config: RunnerConfig,
        kernels: CpuKernels | TorchKernels,
    ) -> ModelRunner:
        """The same from weights that need not be a checkpoint on disk."""
        log = structlog.get_logger(component="model")
        config = weights.config
        layers = make_decoder_layers(config, kernels, runner_config.max_num_batched_tokens)
        plan = ModelPlan(config, layers, kernels)
        span = Span(start=0, end=config.num_layers)
        plan.check_budget(
            span, runner_config.memory_bytes, runner_config.chunk_bytes, runner_config.max_model_len
        )
        pool = MemoryPool(
            make_memory(kernels.device, runner_config.memory_bytes, runner_config.chunk_bytes)
        )
        stage = Stage(plan, span, weights, pool, kernels)
        num_bytes = sum(stage.load(span))
        pool.grow_kv_evenly(range(span.start, span.end))
        runner = cls(plan, stage, pool, kernels, runner_config.max_model_len)
        log.info(
            "model loaded",
            layers=len(span),
            weight_bytes=num_bytes,
            kv_tokens=runner.num_blocks * runner.block_size,
            max_model_len=runner.max_model_len,
        )
        return runner

    @property
    def device(self) -> torch.device:
        """Where hidden states and KV are."""
        return self._kernels.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of hidden states and KV."""
        return self._kernels.dtype

    @property
    def kernels(self) -> Kernels:
        """What computes on the device."""
        return self._kernels

    @property
    def stage(self) -> Stage:
        """The layers and their weights."""
        return self._stage

    @property
    def block_size(self) -> int:
        """Tokens of a KV block."""
        return self._plan.block_size

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one KV block of one layer."""
        return self._plan.kv_block_bytes

    @property
    def kv_block_shape(self) -> tuple[int, ...]:
        """Shape of one block of one layer."""
        return self._plan.kv_block_shape

    @property
    def span(self) -> Span:
        """The layers this worker serves: all of them, or those of the last `keep`."""
        return self._span

    @property
    def whole(self) -> Span:
        """All layers of the model."""
        return self._stage.span

    @property
    def resident_layers(self) -> tuple[Span, ...]:
        """The layers whose weights are here."""
        return self._stage.resident_layers

    @property
    def num_blocks(self) -> int:
        """KV blocks that every layer of the span has."""
        return self.pool.num_kv_blocks(range(self.span.start, self.span.end))

    @property
    def num_changes(self) -> int:
        """Rises whenever memory changes hands, or layers come or go."""
        return self.pool.num_changes + self._stage.num_changes

    @property
    def part_bytes(self) -> PartBytes:
        """What the parts of the model take of the budget, in whole chunks."""
        return self._plan.part_bytes(self.pool.chunk_bytes)

    # --- computing -------------------------------------------------------------------------------

    def make_batch(self, slices: Sequence[SequenceSlice]) -> ForwardBatch:
        """Lay out the slices of a step, in the order given, on the device."""
        if not self.pool.is_populated:
            end_block = max(max(one.block_table) for one in slices) + 1
            self.pool.populate_kv(range(self.span.start, self.span.end), end_block)
        batch = make_batch(slices, self.block_size)
        return batch if self.device.type == "cpu" else batch.to(self.device)

    def synchronize(self) -> None:
        """Wait until the device has done everything that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def run(
        self, slices: Sequence[SequenceSlice], rows: Sequence[SamplingRow]
    ) -> list[SampledToken]:
        """Compute a batch; one token for each slice that wants one, in their order."""
        batch = self.make_batch(slices)
        return self.sample(self.forward(batch, self.embed(batch), self.span), batch, rows)

    @torch.inference_mode()
    def logits(self, slices: Sequence[SequenceSlice]) -> Iterator[torch.Tensor]:
        """Compute a batch; logits `[rows, vocab]` of slices that want a token, a few at once."""
        batch = self.make_batch(slices)
        yield from self._logits(self.forward(batch, self.embed(batch), self.span), batch)

    @torch.inference_mode()
    def embed(self, batch: ForwardBatch) -> torch.Tensor:  # [num_tokens, hidden_size]
        """Hidden states before the first layer; only where the span starts there."""
        return self._stage.embed(batch.token_ids)

    @torch.inference_mode()
    def forward(
        self,
        batch: ForwardBatch,
        hidden: torch.Tensor,  # [num_tokens, hidden_size], overwritten
        span: Span,
    ) -> torch.Tensor:  # [num_tokens, hidden_size]
        """Run the layers of `span`, which must be served here; writes the batch's KV."""
        began_at = time.perf_counter()
        self._stage.forward(hidden, batch, span)
        ended_at = time.perf_counter()
        self.activity.ran(ended_at - began_at, ended_at)
        if self.device.type == "cpu":  # another device goes on by itself
            self.meter.computed(batch.chunks, len(span), ended_at - began_at)
        return hidden

    @torch.inference_mode()
    def sample(
        self,
        hidden: torch.Tensor,  # [num_tokens, hidden_size] behind the last layer
        batch: ForwardBatch,
        rows: Sequence[SamplingRow],
    ) -> list[SampledToken]:
        """One token for each slice that wants one; only where the span ends the model."""
        tokens: list[SampledToken] = []
        for logits in self._logits(hidden, batch):
            tokens += self._sample(logits, rows[len(tokens) : len(tokens) + len(logits)])
        return tokens

    def _logits(self, hidden: torch.Tensor, batch: ForwardBatch) -> Iterator[torch.Tensor]:
        """Logits `[rows, vocab]`, a few rows at once.

        A batch of many short requests would else need more memory than its whole KV.
        """
        for start in range(0, batch.logits_rows.numel(), _LOGITS_ROWS):
            yield self._stage.logits(hidden, batch.logits_rows[start : start + _LOGITS_ROWS])

    # --- layers come and go ----------------------------------------------------------------------

    def keep(self, span: Span) -> int:
        """Serve `span`, all of which is here: give the weights of other layers to the KV of these.

        The KV of the other layers stays as it is, until `settle`.

        Returns:
            The number of blocks there are now; those that were there keep their content.
        """
        self._span = span
        self._stage.drop(span)
        return self.pool.grow_kv_evenly(range(span.start, span.end))

    def shrink(self, num_blocks: int, moves: Sequence[BlockMove]) -> None:
        """Leave `num_blocks` blocks to the layers of the span, after copying blocks down."""
        layers = range(self.span.start, self.span.end)
        sources = self._index([move.source for move in moves])
        destinations = self._index([move.destination for move in moves])
        for layer in layers if moves else ():
            cache = self.kv_cache(layer)
            cache[destinations] = cache[sources]
        self.pool.shrink_kv(layers, num_blocks)

    def blocks_with(self, span: Span) -> int:
        """Blocks there can be while this worker holds `span` beside the layers that it serves."""
        plan = self._plan
        arenas = {a.name: a.layout.nbytes for s in (self.span, span) for a in plan.arenas(s)}
        block_bytes = [self.kv_block_bytes] * len(self._beside(span))
        num_chunks = self.pool.budget_bytes // self.pool.chunk_bytes
        return most_blocks(num_chunks, list(arenas.values()), block_bytes, self.pool.chunk_bytes)

    def load_missing(self, span: Span, source: ArenaSource | None = None) -> Iterator[int]:
        """Load what serving `span` needs and is not here, and give its layers their KV.

        The layers that are served have as many blocks then as those of `span`. Yields the bytes of
        each piece, which takes less than a millisecond or so.

        Raises:
            CheckpointError: a tensor cannot be read.
            OutOfChunksError: too little of the pool is free.
        """
        yield from self._stage.load(span, source)
        self.pool.grow_kv_evenly(self._beside(span))

    def _beside(self, span: Span) -> list[int]:
        """The layers of `span` and those that are served."""
        return [n for n in range(self.config.num_layers) if n in span or n in self.span]

    def reload(self) -> Iterator[int]:
        """Become a whole replica out of any state, piece by piece; no block may be in use.

        Yields the bytes of each piece, as `load_missing` does.

        Raises:
            CheckpointError: a tensor cannot be read.
        """
        self.pool.shrink_kv(range(self.config.num_layers), self.blocks_with(self.whole))
        yield from self.load_missing(self.whole)
        self._span = self.whole

    def settle(self) -> int:
        """Give the KV of layers that are not served to those that are; returns their blocks."""
        others = [layer for layer in range(self.config.num_layers) if layer not in self.span]
        self.pool.shrink_kv(others, 0)
        return self.pool.grow_kv_evenly(range(self.span.start, self.span.end))

    def kv_cache(self, layer: int) -> torch.Tensor:
        """KV of a layer `[max_blocks, *kv_block_shape]`; only mapped blocks may be touched."""
        return self._stage.kv_cache(layer)

    def _index(self, blocks: Sequence[int]) -> torch.Tensor:  # [num_blocks] int64
        return torch.tensor(blocks, dtype=torch.int64, device=self.device)

    def close(self) -> None:
        """Give the memory back; nothing may be computed afterwards."""
        self.pool.close()
        self._kernels.close()
