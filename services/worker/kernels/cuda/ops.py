"""The Triton kernels as `LayerOps`. Has run in Triton's interpreter only, never on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.worker.kernels.cuda.attention import attend
from services.worker.kernels.cuda.blocks import gather_blocks, scatter_blocks
from services.worker.kernels.cuda.elementwise import (
    rms_norm,
    rope_and_store,
    silu_mul,
    store_kv,
)
from services.worker.kernels.ops import HeadNorms, PagedBatch


class TritonOps:
    """Implements `LayerOps`."""

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        """out = x / sqrt(mean(x ** 2) + eps) * weight, row by row."""
        rms_norm(x, weight, eps, out)

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """out = silu(gate) * up."""
        silu_mul(gate_up, out)

    def rope_and_store(
        self,
        qkv: torch.Tensor,
        batch: PagedBatch,
        norms: HeadNorms | None,
        kv_cache: torch.Tensor,
    ) -> None:
        """(Normalise and) rotate q in place and k, and store k and v at their slots."""
        rope_and_store(qkv, kv_cache, batch, norms)

    def store_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> None:
        """Store k and v at their slots."""
        store_kv(key, value, slot_mapping, kv_cache)

    def attention(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: PagedBatch,
        scale: float,
        sliding_window: int,
        out: torch.Tensor,
    ) -> None:
        """Causal grouped-query attention over the paged KV."""
        attend(query, kv_cache, batch, scale, sliding_window, out)

    def gather_blocks(
        self, caches: Sequence[torch.Tensor], block_table: Sequence[int], part: torch.Tensor
    ) -> None:
        """Copy the blocks of each layer to `part`."""
        gather_blocks(caches, block_table, part)

    def scatter_blocks(
        self, caches: Sequence[torch.Tensor], block_table: Sequence[int], part: torch.Tensor
    ) -> None:
        """Copy `part` to the blocks of each layer."""
        scatter_blocks(caches, block_table, part)
