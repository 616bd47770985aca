"""What a decoder layer computes beside its matrix products, on whatever device its tensors are;
and how the KV of many layers is copied.

The Triton kernels (`cuda/ops.py`) do it on a GPU. `tests/torch_ops.py` says the same in plain
torch; it is their oracle, and with it the layers of a CUDA worker run in tests on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from services.worker.model.batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """A batch as layers see it, with the rotary embedding of its positions.

    The numbers are known on the host and may be larger ranges than the tensors': a kernel's grid
    depends on them, its results do not.
    """

    cos: torch.Tensor  # [num_tokens, head_dim] fp32, the halves equal
    sin: torch.Tensor  # [num_tokens, head_dim] fp32
    slot_mapping: torch.Tensor  # [num_tokens] int64; negative: not stored
    block_table: torch.Tensor  # [num_seqs, max_blocks] int32
    cu_seqlens_q: torch.Tensor  # [num_seqs + 1] int32
    seqused_k: torch.Tensor  # [num_seqs] int32
    min_seqlen_q: int
    max_seqlen_q: int
    max_seqlen_k: int

    @classmethod
    def of(cls, batch: ForwardBatch, cos: torch.Tensor, sin: torch.Tensor) -> PagedBatch:
        """`batch` with cos and sin of its tokens."""
        lengths = [chunk.num_tokens for chunk in batch.chunks]
        return cls(
            cos,
            sin,
            batch.slot_mapping,
            batch.block_table,
            batch.cu_seqlens_q,
            batch.seqused_k,
            min_seqlen_q=min(lengths),
            max_seqlen_q=max(lengths),
            max_seqlen_k=batch.end_position,
        )


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights of the norms of query and key heads (Qwen3), each [head_dim]."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


class LayerOps(Protocol):
    """All results are written to the last argument or in place; nothing waits for the device."""

    def rms_norm(
        self,
        x: torch.Tensor,  # [rows, size]
        weight: torch.Tensor,  # [size]
        eps: float,
        out: torch.Tensor,  # [rows, size], may be x
    ) -> None:
        """out = x / sqrt(mean(x ** 2) + eps) * weight, row by row."""
        ...

    def silu_mul(
        self,
        gate_up: torch.Tensor,  # [rows, 2 size], [gate | up] in each row
        out: torch.Tensor,  # [rows, size]
    ) -> None:
        """out = silu(gate) * up."""
        ...

    def rope_and_store(
        self,
        qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 num_kv_heads) * head_dim]
        batch: PagedBatch,
        norms: HeadNorms | None,
        kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
    ) -> None:
        """(Normalise and) rotate q in place and k, and store k and v at their slots.

        A token with a negative slot is not stored.
        """
        ...

    def store_kv(
        self,
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim], strided; heads are contiguous
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]; likewise
        slot_mapping: torch.Tensor,  # [num_tokens] int64
        kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
    ) -> None:
        """Store k, already rotated, and v at their slots; not where the slot is negative."""
        ...

    def attention(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim]; tokens may be strided
        kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
        batch: PagedBatch,
        scale: float,
        sliding_window: int,
        out: torch.Tensor,  # [num_tokens, num_heads, head_dim]
    ) -> None:
        """Causal grouped-query attention over the paged KV.

        Args:
            sliding_window: a query sees this many last positions, its own included; 0 means all.
        """
        ...

    def gather_blocks(
        self,
        caches: Sequence[torch.Tensor],  # of each layer [blocks, ...]
        block_table: Sequence[int],
        part: torch.Tensor,  # [num_layers * num_blocks * block_bytes] uint8
    ) -> None:
        """Copy the blocks `block_table` of each layer to `part`."""
        ...

    def scatter_blocks(
        self,
        caches: Sequence[torch.Tensor],  # of each layer [blocks, ...]
        block_table: Sequence[int],
        part: torch.Tensor,  # [num_layers * num_blocks * block_bytes] uint8
    ) -> None:
        """Copy `part` to the blocks `block_table` of each layer."""
        ...
