"""The interface of what stores, makes and runs the decoder layers of one model.

    DecoderLayers    one per model: what the arena of a layer holds
      make(layer, arena, kv_cache) --> a layer on a filled arena
      run([layers], hidden, batch)     some in a row, in place

`Stage` knows only this; what a layer is, is between the methods of one implementation:

                    Llama family     all others, as Hugging Face's own module
    CPU             llama.py         cpu_transformers.py
    CUDA            torch_llama.py   torch_transformers.py

`factory.py` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch

from services.worker.model.arena import ArenaLayout
from services.worker.model.batch import ForwardBatch

LayerT = TypeVar("LayerT")


class DecoderLayers(Protocol[LayerT]):
    """How the decoder layers of one model are stored, made and run; all have the same layout."""

    @property
    def layout(self) -> ArenaLayout:
        """The arena of a layer; its sources are the short names of `layer_shapes`."""
        ...

    def make(
        self,
        layer: int,
        arena_address: int,
        kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
    ) -> LayerT:
        """Decoder layer `layer` on a filled arena.

        Args:
            kv_cache: the layer's whole range; only blocks that are mapped may be touched.
        """
        ...

    def run(
        self,
        layers: Sequence[LayerT],
        start: int,
        hidden: torch.Tensor,  # [num_tokens, hidden], overwritten with the result
        batch: ForwardBatch,
        cos: torch.Tensor,  # [num_tokens, head_dim] fp32, the halves equal
        sin: torch.Tensor,  # [num_tokens, head_dim] fp32
    ) -> None:
        """Run neighbouring layers, the first of which is `start`; writes the batch's KV."""
        ...
