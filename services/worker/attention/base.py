"""What a layer that brings its own projections needs of attention: store K and V, then attend.

The fused layers (`llama.py` and `torch_llama.py` in `services/worker/model/layers`) do this between
their products and need no such object; the Hugging Face layers call it through transformers'
`AttentionInterface`.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

#: How the device's kernels take a batch: `AttentionBatch` on the CPU, `PagedBatch` elsewhere.
BatchT = TypeVar("BatchT", contravariant=True)


class PagedAttention(Protocol[BatchT]):
    """Causal grouped-query attention of a batch over one layer's paged KV."""

    def forward(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim], rotated
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim], rotated
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
        batch: BatchT,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:  # [num_tokens, num_heads, head_dim]
        """Store the batch's keys and values at its slots, then attend to all that is stored."""
        ...
