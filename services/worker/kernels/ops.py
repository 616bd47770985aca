"""What a decoder layer computes beside its matrix products, on whatever device its tensors are.

The Triton kernels (`cuda/ops.py`) do it on a GPU. `tests/torch_ops.py` says the same in plain
torch; it is their oracle, and with it the layers of a CUDA worker run in tests on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from services.worker.model.batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class RotatedBatch:
    """A batch and the rotary embedding of its positions."""

    batch: ForwardBatch
    cos: torch.Tensor  # [num_tokens, head_dim] fp32, the halves equal
    sin: torch.Tensor  # [num_tokens, head_dim] fp32


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
        rotated: RotatedBatch,
        norms: HeadNorms | None,
        kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
    ) -> None:
        """(Normalise and) rotate q in place and k, and store k and v at their slots.

        A token with a negative slot is not stored.
        """
        ...

    def attention(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim]; tokens may be strided
        kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
        batch: ForwardBatch,
        scale: float,
        sliding_window: int,
        out: torch.Tensor,  # [num_tokens, num_heads, head_dim]
    ) -> None:
        """Causal grouped-query attention over the paged KV.

        Args:
            sliding_window: a query sees this many last positions, its own included; 0 means all.
        """
        ...
