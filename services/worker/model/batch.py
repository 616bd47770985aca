"""One batch as the layers see it: all new tokens of all requests in one flat row of tokens.

requests      A (decode)   B (prefill chunk of 3)      C (decode)
token_ids     [a9]         [b4  b5  b6]                [c2]
cu_seqlens_q  0            1           4               5
seqused_k     10           7                           3      tokens of each in the KV cache
slot_mapping  where each token's key and value go: block * block_size + offset
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


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


def make_batch(slices: Sequence[SequenceSlice], block_size: int) -> ForwardBatch:
    """Lay out the slices of a step, in the order given."""
    lengths = torch.tensor([len(item.token_ids) for item in slices])
    starts = torch.tensor([item.start for item in slices])
    ends = torch.cumsum(lengths, dim=0)  # [num_seqs]
    num_tokens = int(ends[-1])
    sequence = torch.repeat_interleave(torch.arange(len(slices)), lengths)  # [num_tokens]
    positions = torch.arange(num_tokens) - (ends - lengths)[sequence] + starts[sequence]
    tables = [torch.tensor(item.block_table, dtype=torch.int32) for item in slices]
    block_table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)
    blocks = block_table[sequence, positions // block_size].to(torch.int64)
    wanted = torch.tensor([item.wants_token for item in slices])
    return ForwardBatch(
        token_ids=torch.tensor([token for item in slices for token in item.token_ids]),
        positions=positions,
        slot_mapping=blocks * block_size + positions % block_size,
        cu_seqlens_q=torch.nn.functional.pad(ends, (1, 0)).to(torch.int32),
        seqused_k=(starts + lengths).to(torch.int32),
        block_table=block_table,
        logits_rows=(ends - 1)[wanted],
        end_position=max(item.start + len(item.token_ids) for item in slices),
    )
