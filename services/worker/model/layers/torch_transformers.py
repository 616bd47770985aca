"""The Hugging Face decoder layer on a CUDA device: all transformers' own but attention.

Its matrices stay nn.Linear, whose weights are plain matrices in the arena. Nothing in the modules
waits for the device or depends on values there, so a layer can be captured in a CUDA graph.

Memory beside the budget: modules allocate as they go, so there is no workspace to reserve. Instead
the largest batch runs once, through a layer of zeros, before the budget for weights and KV is
taken. So what does not fit fails at the start; the budget never grows, so what fitted then can be
had again, unless another program takes it. What graphs keep (once, as they share it: what one layer
allocates for `MAX_SEQS` tokens) is not counted. It has the room of the zeros, which leave with that
batch and are more by estimate, from SmolLM3-3B to Seed-OSS-36B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from services.worker.attention.torch_attention import TorchAttention
from services.worker.kernels.ops import PagedBatch
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.model.arena import ArenaLayout
from services.worker.model.batch import ForwardBatch, SequenceSlice, make_batch
from services.worker.model.config import ModelConfig
from services.worker.model.graphs import MAX_SEQS, DecodeGraphs, run_layers
from services.worker.model.layers.transformers_layer import TransformersLayer, TransformersModules
from services.worker.model.rotary import RotaryTable


class TorchTransformersLayers:
    """The layers of one model. Implements `DecoderLayers`."""

    def __init__(
        self,
        config: ModelConfig,
        kernels: TorchKernels,
        graphs: DecodeGraphs | None,
        max_num_tokens: int,
    ) -> None:
        """Run batches of single tokens with `graphs`, where there are some that serve them.

        Args:
            max_num_tokens: of any batch.

        Raises:
            ConfigError: the model's rotary embedding is not served.
        """
        self._modules = TransformersModules(config, kernels)
        self._attention = TorchAttention(kernels.ops)
        self._graphs = graphs
        self._run_once(config, kernels, max(max_num_tokens, MAX_SEQS))

    @property
    def layout(self) -> ArenaLayout:
        """The arena of a layer."""
        return self._modules.layout

    def make(
        self,
        layer: int,
        arena_address: int,
        kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
    ) -> TransformersLayer[PagedBatch]:
        """Decoder layer `layer` on a filled arena."""
        return self._modules.make(layer, arena_address, kv_cache, self._attention)

    def run(
        self,
        layers: Sequence[TransformersLayer[PagedBatch]],
        start: int,
        hidden: torch.Tensor,  # [num_tokens, hidden], overwritten with the result
        batch: ForwardBatch,
        cos: torch.Tensor,  # [num_tokens, head_dim] fp32, the halves equal
        sin: torch.Tensor,  # [num_tokens, head_dim] fp32
    ) -> None:
        """Run neighbouring layers; writes the batch's KV."""
        forwards = [layer.forward for layer in layers]
        run_layers(forwards, start, hidden, PagedBatch.of(batch, cos, sin), self._graphs)

    def _run_once(self, config: ModelConfig, kernels: TorchKernels, num_tokens: int) -> None:
        """Run `num_tokens` tokens, a prompt and many single ones, through a layer of zeros.

        All their KV is in one block. Attention makes room for sequences as long as they can get.
        """
        block_size, device, dtype = kernels.block_size, kernels.device, kernels.dtype
        lengths = [1] * (MAX_SEQS - 1) + [num_tokens - MAX_SEQS + 1]
        slices = [SequenceSlice([0] * n, 0, [0] * -(-n // block_size), False) for n in lengths]
        batch = make_batch(slices, block_size).to(device)
        cos, sin = RotaryTable(config, device).rows(batch.positions, batch.end_position)
        paged = replace(PagedBatch.of(batch, cos, sin), max_seqlen_k=config.max_model_len)
        kv_shape = (1, 2, block_size, config.num_kv_heads, config.head_dim)
        kv_cache = torch.zeros(kv_shape, dtype=dtype, device=device)
        arena = torch.zeros(self.layout.nbytes, dtype=torch.uint8, device=device)
        hidden = torch.zeros(num_tokens, config.hidden_size, dtype=dtype, device=device)
        self.make(0, arena.data_ptr(), kv_cache).forward(hidden, paged)
