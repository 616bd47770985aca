"""Paged attention on the CPU: torch stores K and V, the compiled kernel attends in place."""

from __future__ import annotations

import torch

from services.worker.kernels.cpu import AttentionBatch, CpuKernels
from services.worker.kernels.library import LayerGeometry


class CpuAttention:
    """Implements `PagedAttention[AttentionBatch]`."""

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels

    def forward(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
        batch: AttentionBatch,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:  # [num_tokens, num_heads, head_dim]
        """Store the batch's keys and values at its slots, then attend to all that is stored."""
        block_size = kv_cache.shape[2]
        blocks, offsets = batch.slot_mapping // block_size, batch.slot_mapping % block_size
        kv_cache[blocks, 0, offsets] = key
        kv_cache[blocks, 1, offsets] = value
        _, num_heads, head_dim = query.shape
        geometry = LayerGeometry(
            num_heads=num_heads,
            num_kv_heads=key.shape[1],
            head_dim=head_dim,
            sliding_window=sliding_window or 0,
            scale=scale,
        )
        out = torch.empty(query.shape)
        self._kernels.paged_attention(query.contiguous(), kv_cache.data_ptr(), geometry, batch, out)
        return out
