"""One batch as the layers see it: all new tokens of all requests in one flat row of tokens.

requests      A (decode)   B (prefill chunk of 3)      C (decode)
token_ids     [a9]         [b4  b5  b6]                [c2]
cu_seqlens_q  0            1           4               5
seqused_k     10           7                           3      tokens of each in the KV cache
slot_mapping  where each token's key and value go: block * block_size + offset

A token that the launch before samples may not be known on the host yet; it is filled in where the
model computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import numpy as np
import torch

from services.worker.engine.cost_model import ChunkShape
from services.worker.model.queues.base import Array
from services.worker.model.queues.host import on_host

#: Stands for a token that is known only where the model computes.
UNKNOWN_TOKEN = 0

#: Puts arrays where the model computes; `DeviceQueue.place` does.
Place = Callable[[Sequence[Array]], list[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """What a batch computes of one request: its tokens `[start, start + len(token_ids))`."""

    token_ids: Sequence[int]
    start: int  # position of the first of them, i.e. num_computed_tokens
    block_table: Sequence[int]  # KV blocks, covering at least the slice's end
    wants_token: bool  # the slice reaches the request's last token, so logits are needed
    source_row: int | None = None  # of the launch before, which samples the last of token_ids


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


def make_batch(
    slices: Sequence[SequenceSlice],
    block_size: int,
    place: Place = on_host,
    source_ids: torch.Tensor | None = None,  # [rows] int64
) -> ForwardBatch:
    """Lay out the slices of a step, in the order given.

    Args:
        place: puts it where the model computes.
        source_ids: the tokens of the launch before, there; needed where a slice has a `source_row`.
    """
    chunks = tuple(ChunkShape(item.start, len(item.token_ids)) for item in slices)
    tensors = place([*_layout(slices, chunks, block_size), *_unknown_tokens(slices)])
    token_ids, positions, slots, cu_seqlens_q, seqused_k, table, logits_rows, *unknown = tensors
    if unknown:
        if source_ids is None:
            raise ValueError("a token comes from a launch before, but there is none")
        rows, source_rows = unknown
        token_ids.index_copy_(0, rows, source_ids[source_rows])
    return ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        slot_mapping=slots,
        cu_seqlens_q=cu_seqlens_q,
        seqused_k=seqused_k,
        block_table=table,
        logits_rows=logits_rows,
        end_position=max(map(sum, chunks)),
        chunks=chunks,
    )


def _layout(
    slices: Sequence[SequenceSlice], chunks: Sequence[ChunkShape], block_size: int
) -> list[Array]:
    """The tensors of a batch, in the order of its fields. In NumPy: torch is slower with these."""
    starts, lengths = np.array(chunks, dtype=np.int64).T
    ends = np.cumsum(lengths)  # [num_seqs]
    sequence = np.repeat(np.arange(len(slices)), lengths)  # [num_tokens]
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths - starts, lengths)
    block_table = np.zeros((len(slices), max(len(s.block_table) for s in slices)), np.int32)
    for row, item in zip(block_table, slices, strict=True):
        row[: len(item.block_table)] = item.block_table
    blocks = block_table[sequence, positions // block_size].astype(np.int64)
    return [
        np.fromiter(chain.from_iterable(s.token_ids for s in slices), np.int64, ends[-1]),
        positions,
        blocks * block_size + positions % block_size,
        np.concatenate(([0], ends)).astype(np.int32),
        (starts + lengths).astype(np.int32),
        block_table,
        (ends - 1)[np.array([s.wants_token for s in slices])],
    ]


def _unknown_tokens(slices: Sequence[SequenceSlice]) -> list[Array]:
    """Rows of tokens that are unknown here, and rows of the launch before; else nothing."""
    ends = accumulate(len(item.token_ids) for item in slices)
    pairs = [
        (end - 1, item.source_row)
        for end, item in zip(ends, slices, strict=True)
        if item.source_row is not None
    ]
    return [np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True)]
