"""The interface of a decoder layer, and of what stores and makes the layers of one model.

    DecoderLayers  one per model: what the arena of a layer holds
         | make(layer, arena, kv_cache)        | prepare(batch, cos, sin), once per step
    DecoderLayer   one per resident layer: forward(hidden, step), in place

`Stage` knows only these two; what `prepare` makes of a batch is between the layers of one kind.
Implementations: `llama.py` (fused CPU kernels), `transformers_layer.py` (Hugging Face's own module,
for the architectures beyond the Llama family) and `torch_llama.py` (CUDA); `factory.py` chooses.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

from services.worker.model.arena import ArenaLayout
from services.worker.model.batch import ForwardBatch

StepT = TypeVar("StepT")
StepT_contra = TypeVar("StepT_contra", contravariant=True)


class DecoderLayer(Protocol[StepT_contra]):
    """A layer whose weights are in memory."""

    def forward(
        self,
        hidden: torch.Tensor,  # [num_tokens, hidden], overwritten with the result
        batch: StepT_contra,
    ) -> None:
        """Run the layer; writes the KV of the batch's tokens."""
        ...


class DecoderLayers(Protocol[StepT]):
    """How the decoder layers of one model are stored and made; all have the same layout."""

    @property
    def layout(self) -> ArenaLayout:
        """The arena of a layer; its sources are the short names of `layer_shapes`."""
        ...

    def prepare(
        self,
        batch: ForwardBatch,
        cos: torch.Tensor,  # [num_tokens, head_dim] fp32, the halves equal
        sin: torch.Tensor,  # [num_tokens, head_dim] fp32
    ) -> StepT:
        """What the layers of a step are given of its batch."""
        ...

    def make(
        self,
        layer: int,
        arena_address: int,
        kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
    ) -> DecoderLayer[StepT]:
        """Decoder layer `layer` on a filled arena.

        Args:
            kv_cache: the layer's whole range; only blocks that are mapped may be touched.
        """
        ...
