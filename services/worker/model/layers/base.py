"""The interface of a decoder layer, and of what stores and makes the layers of one model.

    DecoderLayers  one per model: what the arena of a layer holds
         | make(layer, arena, kv_cache)
    DecoderLayer   one per resident layer: forward(hidden, batch), in place

`Stage` knows only these two. Implementations: `llama.py` (fused kernels, fast) and
`transformers_layer.py` (Hugging Face's own module, for the architectures beyond the Llama family);
`factory.py` chooses.
"""

from __future__ import annotations

from typing import Protocol

import torch

from services.worker.kernels.cpu import AttentionBatch
from services.worker.model.arena import ArenaLayout


class DecoderLayer(Protocol):
    """A layer whose weights are in memory."""

    def forward(
        self,
        hidden: torch.Tensor,  # [num_tokens, hidden], overwritten with the result
        batch: AttentionBatch,
    ) -> None:
        """Run the layer; writes the KV of the batch's tokens."""
        ...


class DecoderLayers(Protocol):
    """How the decoder layers of one model are stored and made; all have the same layout."""

    @property
    def layout(self) -> ArenaLayout:
        """The arena of a layer; its sources are the short names of `layer_shapes`."""
        ...

    def make(
        self,
        layer: int,
        arena_address: int,
        kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
    ) -> DecoderLayer:
        """Decoder layer `layer` on a filled arena.

        Args:
            kv_cache: the layer's whole range; only blocks that are mapped may be touched.
        """
        ...
