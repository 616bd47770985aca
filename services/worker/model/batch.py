"""One batch as the layers see it: all new tokens of all requests in one flat row of tokens.

requests      A (decode)   B (prefill chunk of 3)      C (decode)
token_ids     [a9]         [b4  b5  b6]                [c2]
cu_seqlens_q  0            1           4               5
seqused_k     10           7                           3      tokens of each in the KV cache
slot_mapping  where each token's key and value go: block * block_size + offset
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from services.worker.engine.cost_model import ChunkShape


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """What a batch computes of one request: its tokens `[start, start + len(token_ids))`."""

    token_ids: Sequence[int]
    start: int  # position of the first of them, i.e. num_computed_tokens
    block_table: Sequence[int]  # KV blocks, covering at least the slice's end
    wants_token: bool  # the slice reaches the request's last token, so logits are needed


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Flat tensors of a batch; field names are those of vLLM and FlashAttention."""

    token_ids: torch.Tensor  # [num_tokens] int64
    positions: torch.Tensor  # [num_tokens] int64
    slot_mapping: torch.Tensor  # [num_tokens] int64
    cu_seqlens_q: torch.Tensor  # [num_seqs + 1] int32
    seqused_k: torch.Tensor  # [num_seqs] int32
    block_table: torch.Tensor  # [num_seqs, max_blocks] int32, padded with 0
    logits_rows: torch.Tensor  # [num_logits] int64: rows of tokens whose logits are wanted
    end_position: int  # above every position
    chunks: tuple[ChunkShape, ...]  # what it costs depends on these

    def to(self, device: torch.device) -> ForwardBatch:
        """The batch on `device`; the copies are ordered before what is launched next there."""
        return replace(
            self,
            token_ids=self.token_ids.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            slot_mapping=self.slot_mapping.to(device, non_blocking=True),
            cu_seqlens_q=self.cu_seqlens_q.to(device, non_blocking=True),
            seqused_k=self.seqused_k.to(device, non_blocking=True),
            block_table=self.block_table.to(device, non_blocking=True),
            logits_rows=self.logits_rows.to(device, non_blocking=True),
        )


def make_batch(slices: Sequence[SequenceSlice], block_size: int) -> ForwardBatch:
    """Lay out the slices of a step, in the order given. In NumPy: tensors this small cost more."""
    chunks = tuple(ChunkShape(item.start, len(item.token_ids)) for item in slices)
    starts, lengths = np.array(chunks, dtype=np.int64).T
    ends = np.cumsum(lengths)  # [num_seqs]
    sequence = np.repeat(np.arange(len(slices)), lengths)  # [num_tokens]
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths - starts, lengths)
    block_table = np.zeros((len(slices), max(len(s.block_table) for s in slices)), np.int32)
    for row, item in zip(block_table, slices, strict=True):
        row[: len(item.block_table)] = item.block_table
    blocks = block_table[sequence, positions // block_size].astype(np.int64)
    token_ids = np.fromiter(chain.from_iterable(s.token_ids for s in slices), np.int64, ends[-1])
    return ForwardBatch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(blocks * block_size + positions % block_size),
        cu_seqlens_q=torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)),
        seqused_k=torch.from_numpy((starts + lengths).astype(np.int32)),
        block_table=torch.from_numpy(block_table),
        logits_rows=torch.from_numpy((ends - 1)[np.array([s.wants_token for s in slices])]),
        end_position=int((starts + lengths).max()),
        chunks=chunks,
    )
