"""Paged attention of a CUDA worker: both steps are `LayerOps`, so nothing waits for the device."""

from __future__ import annotations

import torch

from services.worker.kernels.ops import LayerOps, PagedBatch


class TorchAttention:
    """Implements `PagedAttention[PagedBatch]`."""

    def __init__(self, ops: LayerOps) -> None:
        self._ops = ops

    def forward(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
        batch: PagedBatch,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:  # [num_tokens, num_heads, head_dim]
        """Store the batch's keys and values at its slots, then attend to all that is stored."""
        self._ops.store_kv(key, value, batch.slot_mapping, kv_cache)
        query = query.contiguous()
        out = torch.empty_like(query)
        self._ops.attention(query, kv_cache, batch, scale, sliding_window or 0, out)
        return out
