"""What the kernels of a CUDA worker compute, in plain torch on any device: their oracle."""

from __future__ import annotations

import torch

from services.worker.kernels.blocks import gather_blocks, scatter_blocks
from services.worker.kernels.ops import HeadNorms, PagedBatch
from tests import oracles


class TorchOps:
    """Implements `LayerOps`."""

    gather_blocks = staticmethod(gather_blocks)
    scatter_blocks = staticmethod(scatter_blocks)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        out.copy_(_normalised(x, weight, eps))

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        gate, up = gate_up.chunk(2, dim=-1)
        out.copy_(torch.nn.functional.silu(gate) * up)

    def rope_and_store(
        self,
        qkv: torch.Tensor,
        batch: PagedBatch,
        norms: HeadNorms | None,
        kv_cache: torch.Tensor,
    ) -> None:
        _, _, _, num_kv_heads, head_dim = kv_cache.shape
        heads = qkv.view(len(qkv), -1, head_dim)
        num_heads = heads.shape[1] - 2 * num_kv_heads
        query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        if norms is not None:
            query = _normalised(query, norms.query, norms.eps)
            key = _normalised(key, norms.key, norms.eps)
        heads[:, :num_heads] = _rotated(query, batch)
        self.store_kv(_rotated(key, batch), value, batch.slot_mapping, kv_cache)

    def store_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> None:
        is_stored = slot_mapping >= 0
        slots, block_size = slot_mapping[is_stored], kv_cache.shape[2]
        blocks, offsets = slots // block_size, slots % block_size
        kv_cache[blocks, 0, offsets] = key[is_stored]
        kv_cache[blocks, 1, offsets] = value[is_stored]

    def attention(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: PagedBatch,
        scale: float,
        sliding_window: int,
        out: torch.Tensor,
    ) -> None:
        out.copy_(
            oracles.paged_attention(
                query,
                kv_cache,
                batch.block_table,
                batch.cu_seqlens_q,
                batch.seqused_k,
                scale,
                sliding_window,
            )
        )


def _normalised(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    values = x.float()
    scale = torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps)
    return (values * scale).to(x.dtype) * weight


def _rotated(heads: torch.Tensor, batch: PagedBatch) -> torch.Tensor:
    low, high = heads.float().chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    cos, sin = batch.cos[:, None], batch.sin[:, None]
    return (heads.float() * cos + turned * sin).to(heads.dtype)
