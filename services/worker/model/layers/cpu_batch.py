"""A batch as the CPU's layers take it, fused and Hugging Face's alike."""

from __future__ import annotations

import torch

from services.worker.kernels.cpu import AttentionBatch
from services.worker.model.batch import ForwardBatch


def attention_batch(
    batch: ForwardBatch,
    cos: torch.Tensor,  # [num_tokens, head_dim] fp32
    sin: torch.Tensor,  # [num_tokens, head_dim] fp32
) -> AttentionBatch:
    """The batch with the rotary embedding of its positions."""
    return AttentionBatch(
        cos=cos,
        sin=sin,
        slot_mapping=batch.slot_mapping,
        block_table=batch.block_table,
        cu_seqlens_q=batch.cu_seqlens_q,
        seqused_k=batch.seqused_k,
    )
