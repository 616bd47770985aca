"""The model of a worker as the engine uses it: load once, then compute batch after batch.

    launch   slices, rows --> a batch on the device --> layers --> logits --> tokens, pending

Nothing here waits for a device that computes by itself. Layers come and go between two launches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import structlog
import torch

from services.worker.engine.block_manager import BlockMove
from services.worker.engine.profile import ModelProfile
from services.worker.kernels.base import Kernels
from services.worker.kernels.cpu import CpuKernels
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.memory.sizing import most_blocks
from services.worker.meter import EngineMeter
from services.worker.model.arena_source import ArenaSource
from services.worker.model.batch import ForwardBatch, SequenceSlice, make_batch
from services.worker.model.checkpoint import Checkpoint, WeightSource
from services.worker.model.loading import LoadedModel, RunnerConfig, load_model
from services.worker.model.pending import PendingTokens
from services.worker.model.plan import PartBytes
from services.worker.model.queues.base import DeviceQueue
from services.worker.model.queues.factory import make_queue
from services.worker.model.run_times import RunTimes
from services.worker.model.sampler import SamplingRow
from services.worker.model.samplers import make_sampler
from services.worker.model.stage import Stage
from services.worker.work_pacer import BatchActivity
from shared.layout import Span

#: Rows of logits that are in memory at once; enough to be bound by arithmetic.
_LOGITS_ROWS = 64


class ModelRunner:
    """The layers of a model that a worker serves, on its device; at first all of them.

    Build with `load`; used by the engine thread only.
    """

    def __init__(
        self,
        model: LoadedModel,
        kernels: Kernels,
        queue: DeviceQueue,
        max_model_len: int | None,
    ) -> None:
        """Take a loaded model whose KV cache has its size; `max_model_len` restricts it further."""
        plan = model.plan
        self.pool = model.pool
        self.config = plan.config
        self._plan = plan
        self._stage = model.stage
        self._span = model.stage.span
        self._kernels = kernels
        self._queue = queue
        self._sampler = make_sampler(queue, plan.config.vocab_size)
        limit = min(max_model_len or self.config.max_model_len, self.config.max_model_len)
        #: Prompt plus output tokens of the longest request; stays when the KV cache grows.
        self.max_model_len = min(limit, self.num_blocks * self.block_size)
        self.meter = EngineMeter()
        self.activity = BatchActivity()
        self._times = RunTimes(queue, self.meter, self.activity)
        #: What batches cost here, once it is measured.
        self.profile: ModelProfile | None = None

    @classmethod
    def load(
        cls,
        runner_config: RunnerConfig,
        kernels: CpuKernels | TorchKernels,
        queue: DeviceQueue | None = None,
    ) -> ModelRunner:
        """Load every layer and give what is left of the budget to the KV cache.

        Args:
            queue: how the device is asked for things; None: as its kind is.

        Raises:
            ConfigError: the checkpoint or the budget cannot work; one sentence.
        """
        checkpoint = Checkpoint.open(runner_config.model_dir)
        return cls.load_from(checkpoint, runner_config, kernels, queue)

    @classmethod
    def load_from(
        cls,
        weights: WeightSource,
        runner_config: RunnerConfig,
        kernels: CpuKernels | TorchKernels,
        queue: DeviceQueue | None = None,
    ) -> ModelRunner:
        """The same from weights that need not be a checkpoint on disk."""
        model = load_model(weights, runner_config, kernels)
        queue = queue or make_queue(kernels.device)
        runner = cls(model, kernels, queue, runner_config.max_model_len)
        structlog.get_logger(component="model").info(
            "model loaded",
            layers=len(runner.span),
            weight_bytes=runner.pool.usage.weight_bytes,
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

    def make_batch(
        self, slices: Sequence[SequenceSlice], source: PendingTokens | None = None
    ) -> ForwardBatch:
        """Lay out the slices of a step, in the order given, on the device.

        Args:
            source: the launch before, whose tokens may not be known yet.
        """
        if not self.pool.is_populated:
            end_block = max(max(one.block_table) for one in slices) + 1
            self.pool.populate_kv(range(self.span.start, self.span.end), end_block)
        source_ids = None if source is None else source.token_ids
        return make_batch(slices, self.block_size, self._queue.place, source_ids)

    def synchronize(self) -> None:
        """Wait until the device has done everything that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def launch(
        self,
        slices: Sequence[SequenceSlice],
        rows: Sequence[SamplingRow],
        source: PendingTokens | None = None,
    ) -> PendingTokens:
        """Have a batch computed; one token for each slice that wants one, in their order.

        Args:
            source: the launch before, where slices or rows go on from a row of it.
        """
        batch = self.make_batch(slices, source)
        hidden = self.forward(batch, self.embed(batch), self.span)
        return self.sample(hidden, batch, rows, source)

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
        began = self._queue.mark()
        self._stage.forward(hidden, batch, span)
        self._times.launched(began, batch.chunks, len(span))
        return hidden

    @torch.inference_mode()
    def sample(
        self,
        hidden: torch.Tensor,  # [num_tokens, hidden_size] behind the last layer
        batch: ForwardBatch,
        rows: Sequence[SamplingRow],
        source: PendingTokens | None = None,
    ) -> PendingTokens:
        """One token for each slice that wants one; only where the span ends the model."""
        parts = [rows[i : i + _LOGITS_ROWS] for i in range(0, len(rows), _LOGITS_ROWS)]
        source_ids = None if source is None else source.token_ids
        return self._sampler.launch(self._logits(hidden, batch), parts, source_ids)

    def note_progress(self) -> None:
        """Take note of what the device has done since; what runs is known as of the last look."""
        self._times.look()

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
