"""Decode batches replayed from CUDA graphs, one per segment of layers and padded batch size.

    inputs, persistent      hidden | cos | sin | slots | block table | lengths    [MAX_SEQS]
                              | copy in                                  ^ copy out
    segment [0, 4) -replay-> segment [4, 8) -replay-> ... segment [24, 28)

A graph knows addresses and grids, nothing else. Weights and KV keep their addresses while layers
leave and come back and while KV grows, so a graph stays good; a stage replays the segments that lie
within its span, so that a new span needs no new capture, and launches what is left one by one.

A segment is launched one by one at its first use with a batch size, which compiles what it needs,
and captured after that. Rows past the batch's end have no keys and store nothing: their hidden
states are arbitrary, and no other row sees them.

Has run with an imitation of capture only, never on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from services.worker.kernels.ops import PagedBatch
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.model.config import ModelConfig

SEGMENT_LAYERS = 4
#: Requests of the largest batch that is captured.
MAX_SEQS = 256

Work = Callable[[], None]
LayerForward = Callable[[torch.Tensor, PagedBatch], None]


class Capture(Protocol):
    """Makes of some work what does it again at once."""

    def __call__(self, work: Work) -> Work:
        """Record what `work` launches, without doing it; the result replays it."""
        ...


class CudaCapture:
    """CUDA graphs that share one pool of intermediate memory, as they never run side by side."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()  # untyped

    def __call__(self, work: Work) -> Work:
        """Record what `work` launches."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


def padded_batch_size(num_seqs: int) -> int:
    """The next size that is captured: few sizes, and little waste at each."""
    if num_seqs <= 4:
        return 1 << (num_seqs - 1).bit_length()
    step = 8 if num_seqs <= 64 else 32
    return -(-num_seqs // step) * step


class DecodeGraphs:
    """The graphs of one model's layers. Engine thread only."""

    def __init__(
        self,
        config: ModelConfig,
        kernels: TorchKernels,
        capture: Capture,
        segment_layers: int = SEGMENT_LAYERS,
    ) -> None:
        self._num_layers = config.num_layers
        self._segment_layers = segment_layers
        self._inputs = _Inputs(config, kernels)
        self._capture = capture
        self._replays: dict[tuple[int, int], Work] = {}  # by padded size and first layer

    @staticmethod
    def serves(batch: PagedBatch) -> bool:
        """True for batches of single tokens that are not too large."""
        return batch.max_seqlen_q == 1 and len(batch.seqused_k) <= MAX_SEQS

    def run(
        self,
        layers: Sequence[LayerForward],
        start: int,
        hidden: torch.Tensor,  # [num_seqs, hidden], overwritten with the result
        batch: PagedBatch,
    ) -> None:
        """Run neighbouring layers, the first of which is layer `start` of the model."""
        size = padded_batch_size(len(hidden))
        self._inputs.fill(hidden, batch, size)
        first, last = start, start + len(layers)
        while first < last:
            end = min(self._segment_end(first), last)
            self._run_part(layers[first - start : end - start], first, size)
            first = end
        hidden.copy_(self._inputs.hidden[: len(hidden)])

    def _segment_end(self, layer: int) -> int:
        """Where the segment of a layer ends."""
        end = (layer // self._segment_layers + 1) * self._segment_layers
        return min(end, self._num_layers)

    def _run_part(self, layers: Sequence[LayerForward], first: int, size: int) -> None:
        """Run a segment, or the part of one that is here; a whole one is captured."""
        replay = self._replays.get((size, first))
        is_segment = first % self._segment_layers == 0 and first + len(layers) == self._segment_end(
            first
        )
        if is_segment and replay is not None:
            replay()
            return
        hidden, batch = self._inputs.hidden[:size], self._inputs.batch(size)

        def work() -> None:
            for forward in layers:
                forward(hidden, batch)

        work()
        if is_segment:
            self._replays[size, first] = self._capture(work)


def run_layers(
    layers: Sequence[LayerForward],
    start: int,
    hidden: torch.Tensor,  # [num_tokens, hidden], overwritten with the result
    batch: PagedBatch,
    graphs: DecodeGraphs | None,
) -> None:
    """Run neighbouring layers, the first of which is `start`: from graphs where they serve it."""
    if graphs is not None and graphs.serves(batch):
        graphs.run(layers, start, hidden, batch)
        return
    for forward in layers:
        forward(hidden, batch)


class _Inputs:
    """What graphs read and write, at addresses that stay."""

    def __init__(self, config: ModelConfig, kernels: TorchKernels) -> None:
        device = kernels.device
        max_blocks = -(-config.max_model_len // kernels.block_size)
        self._max_model_len = config.max_model_len
        self.hidden = torch.zeros(MAX_SEQS, config.hidden_size, dtype=kernels.dtype, device=device)
        self._cos = torch.zeros(MAX_SEQS, config.head_dim, device=device)
        self._sin = torch.zeros(MAX_SEQS, config.head_dim, device=device)
        self._slot_mapping = torch.zeros(MAX_SEQS, dtype=torch.int64, device=device)
        self._seqused_k = torch.zeros(MAX_SEQS, dtype=torch.int32, device=device)
        self._block_table = torch.zeros(MAX_SEQS, max_blocks, dtype=torch.int32, device=device)
        self._cu_seqlens_q = torch.arange(MAX_SEQS + 1, dtype=torch.int32, device=device)

    def fill(self, hidden: torch.Tensor, batch: PagedBatch, size: int) -> None:
        """Copy a batch in; rows up to `size` become empty sequences."""
        num_seqs, num_blocks = batch.block_table.shape
        self.hidden[:num_seqs].copy_(hidden)
        self._cos[:num_seqs].copy_(batch.cos)
        self._sin[:num_seqs].copy_(batch.sin)
        self._slot_mapping[:num_seqs].copy_(batch.slot_mapping)
        self._seqused_k[:num_seqs].copy_(batch.seqused_k)
        self._block_table[:num_seqs, :num_blocks].copy_(batch.block_table)
        self._slot_mapping[num_seqs:size].fill_(-1)
        self._seqused_k[num_seqs:size].zero_()

    def batch(self, size: int) -> PagedBatch:
        """The first `size` rows; grids are made for the longest sequences there can be."""
        return PagedBatch(
            self._cos[:size],
            self._sin[:size],
            self._slot_mapping[:size],
            self._block_table[:size],
            self._cu_seqlens_q[: size + 1],
            self._seqused_k[:size],
            min_seqlen_q=1,
            max_seqlen_q=1,
            max_seqlen_k=self._max_model_len,
        )
