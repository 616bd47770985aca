"""Paged attention in Triton: one kernel for prompts, single tokens and batches of both.

    grid of prompts        (blocks of queries, KV heads)
    grid of single tokens  (sequences, KV heads, splits of the keys)      then `merge_kernel`

A program holds a tile of queries: BLOCK_Q tokens times the query heads of one KV head, so that a
single token too fills a tensor core's rows. It goes through the keys in tiles, finds each key's
block in the block table and keeps a running softmax. A single token has no queries to divide the
work by, so its keys are divided instead, into at most MAX_SPLITS splits, and merged in their order:
how a row is divided depends on nothing but its length, so its bits do not depend on the batch.

A batch of both is two launches; each leaves out what belongs to the other. Only what was stored is
read (keys past a sequence's end are masked in the load), so stale bytes in a block do no harm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.worker.kernels.ops import PagedBatch

_LOG2_E = 1.4426950408889634
_MIN_ROWS = 16  # of a tile, for tensor cores
_PROMPT_ROWS = 64
_TILE_KEYS = 64
_MAX_SPLITS = 32
_MIN_SPLIT_KEYS = 256


def attend(
    query: torch.Tensor,  # [num_tokens, num_heads, head_dim]; tokens may be strided
    kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
    batch: PagedBatch,
    scale: float,
    sliding_window: int,
    out: torch.Tensor,  # [num_tokens, num_heads, head_dim]
) -> None:
    """Attend to what is stored, the batch's own keys and values included.

    Args:
        sliding_window: a query sees this many last positions, its own included; 0 means all.
    """
    partial = _Partial(query, batch, min(_MAX_SPLITS, -(-batch.max_seqlen_k // _MIN_SPLIT_KEYS)))
    arguments = (query, kv_cache, batch, scale, sliding_window, out, partial)
    if batch.max_seqlen_q > 1:
        _launch(*arguments, is_single=False)
    if batch.min_seqlen_q == 1:
        _launch(*arguments, is_single=True)
        _merge(batch, sliding_window, out, partial)


def _launch(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    sliding_window: int,
    out: torch.Tensor,
    partial: _Partial,
    *,
    is_single: bool,
) -> None:
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.shape[3]
    heads_per_kv_head = num_heads // num_kv_heads
    rows = triton.next_power_of_2(heads_per_kv_head)
    block_m = max(_MIN_ROWS if is_single else _PROMPT_ROWS, rows)
    block_q = 1 if is_single else block_m // heads_per_kv_head
    num_seqs = batch.seqused_k.shape[0]
    # Every sequence has at most one block of queries that is not full.
    num_blocks = num_seqs if is_single else num_tokens // block_q + num_seqs
    grid = (num_blocks, num_kv_heads, partial.num_splits if is_single else 1)
    attention_kernel[grid](
        query,
        kv_cache,
        out,
        partial.out,
        partial.maximum,
        partial.total,
        batch.block_table,
        batch.cu_seqlens_q,
        batch.seqused_k,
        scale * _LOG2_E,
        num_seqs,
        sliding_window,
        partial.num_splits,
        query.stride(0),
        out.stride(0),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        batch.block_table.stride(0),
        HEADS_PER_KV_HEAD=heads_per_kv_head,
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=kv_cache.shape[2],
        BLOCK_M=block_m,
        BLOCK_Q=block_q,
        TILE_KEYS=_TILE_KEYS,
        MIN_SPLIT_KEYS=_MIN_SPLIT_KEYS,
        MAX_SPLITS=_MAX_SPLITS,
        IS_SINGLE=is_single,
        num_warps=4,
    )


def _merge(batch: PagedBatch, sliding_window: int, out: torch.Tensor, partial: _Partial) -> None:
    _, num_heads, head_dim = out.shape
    merge_kernel[(batch.seqused_k.shape[0], num_heads)](
        partial.out,
        partial.maximum,
        partial.total,
        out,
        batch.cu_seqlens_q,
        batch.seqused_k,
        sliding_window,
        partial.num_splits,
        out.stride(0),
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=triton.next_power_of_2(head_dim),
        MIN_SPLIT_KEYS=_MIN_SPLIT_KEYS,
        MAX_SPLITS=_MAX_SPLITS,
        num_warps=4,
    )


class _Partial:
    """What single tokens leave between their two kernels; fp32."""

    def __init__(self, query: torch.Tensor, batch: PagedBatch, num_splits: int) -> None:
        _, num_heads, head_dim = query.shape
        num_seqs = batch.seqused_k.shape[0] if batch.min_seqlen_q == 1 else 0
        rows = (num_seqs, num_heads, num_splits)
        self.num_splits = num_splits
        self.out = torch.empty((*rows, head_dim), dtype=torch.float32, device=query.device)
        self.maximum = torch.empty(rows, dtype=torch.float32, device=query.device)
        self.total = torch.empty(rows, dtype=torch.float32, device=query.device)


@triton.jit
def find_sequence(cu_seqlens_q, block, num_seqs, BLOCK_Q: tl.constexpr):
    """The sequence that block of queries `block` belongs to.

    Blocks of sequence s are numbered from cu_seqlens_q[s] // BLOCK_Q + s on, so that they do not
    overlap; numbers between the last block of one and the first of the next belong to no queries.
    """
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        first = tl.load(cu_seqlens_q + middle) // BLOCK_Q + middle
        if first <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def keys_of_split(num_keys, MIN_SPLIT_KEYS: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Keys of each split of a sequence: few, unless that made too many splits."""
    split_keys = MIN_SPLIT_KEYS
    while split_keys * MAX_SPLITS < num_keys:
        split_keys *= 2
    return split_keys


@triton.jit
def attend_keys(
    q,  # [BLOCK_M, HEAD_DIM_PADDED]
    position,  # [BLOCK_M], of the queries
    kv_cache,  # of one KV head: [blocks, 2, BLOCK_SIZE, HEAD_DIM] by the strides
    table,  # [max_blocks] int32, of one sequence
    first_key,
    end_key,
    scale_log2,
    sliding_window,
    block_stride,
    value_stride,
    slot_stride,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_KEYS: tl.constexpr,
):
    """Queries against the keys `[first_key, end_key)`: softmax's maximum, sum, weighed values."""
    dim = tl.arange(0, HEAD_DIM_PADDED)
    maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    accumulator = tl.zeros([BLOCK_M, HEAD_DIM_PADDED], dtype=tl.float32)
    for start in range(first_key, end_key, TILE_KEYS):
        key = start + tl.arange(0, TILE_KEYS)
        is_key = key < end_key
        kv_block = tl.load(table + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        slot = kv_block * block_stride + (key % BLOCK_SIZE) * slot_stride
        is_kv = is_key[:, None] & (dim < HEAD_DIM)[None, :]
        pointers = kv_cache + slot[:, None] + dim[None, :]
        k = tl.load(pointers, mask=is_kv, other=0.0)
        v = tl.load(pointers + value_stride, mask=is_kv, other=0.0)

        is_visible = is_key[None, :] & (key[None, :] <= position[:, None])
        if sliding_window > 0:
            is_visible = is_visible & (key[None, :] > position[:, None] - sliding_window)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(is_visible, scores, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        # A row that has seen no key yet: any finite number will do.
        reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - reference[:, None])
        decay = tl.exp2(maximum - reference)
        total = total * decay + tl.sum(weights, axis=1)
        accumulator = accumulator * decay[:, None]
        accumulator += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = new_maximum
    return maximum, total, accumulator


@triton.jit
def attention_kernel(
    query,  # [num_tokens, num_heads, HEAD_DIM]
    kv_cache,  # [blocks, 2, BLOCK_SIZE, num_kv_heads, HEAD_DIM]
    out,  # [num_tokens, num_heads, HEAD_DIM]
    partial_out,  # [num_seqs, num_heads, num_splits, HEAD_DIM] fp32
    partial_max,  # [num_seqs, num_heads, num_splits] fp32
    partial_sum,  # [num_seqs, num_heads, num_splits] fp32
    block_table,  # [num_seqs, max_blocks] int32
    cu_seqlens_q,  # [num_seqs + 1] int32
    seqused_k,  # [num_seqs] int32
    scale_log2,
    num_seqs,
    sliding_window,  # 0: none
    num_splits,
    query_stride,
    out_stride,
    block_stride,
    value_stride,
    slot_stride,
    table_stride,
    HEADS_PER_KV_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    MIN_SPLIT_KEYS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    IS_SINGLE: tl.constexpr,
):
    """One tile of queries against all their keys, or a single token against a split of them."""
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if IS_SINGLE:
        sequence = block
    else:
        sequence = find_sequence(cu_seqlens_q, block, num_seqs, BLOCK_Q)
    first_token = tl.load(cu_seqlens_q + sequence)
    num_queries = tl.load(cu_seqlens_q + sequence + 1) - first_token
    num_keys = tl.load(seqused_k + sequence)
    if IS_SINGLE:
        first_query = 0
        if num_queries != 1:
            return
    else:
        first_query = (block - (first_token // BLOCK_Q + sequence)) * BLOCK_Q
        if (first_query >= num_queries) | (num_queries == 1):
            return

    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    query_of_row = first_query + row // HEADS_PER_KV_HEAD
    head = kv_head * HEADS_PER_KV_HEAD + row % HEADS_PER_KV_HEAD
    is_row = (row < BLOCK_Q * HEADS_PER_KV_HEAD) & (query_of_row < num_queries)
    position = num_keys - num_queries + query_of_row  # [BLOCK_M]
    is_element = is_row[:, None] & (dim < HEAD_DIM)[None, :]
    token = (first_token + query_of_row).to(tl.int64)
    q = tl.load(
        query + (token * query_stride + head * HEAD_DIM)[:, None] + dim[None, :],
        mask=is_element,
        other=0.0,
    )

    # Keys that some query of the tile sees: [first_key, end_key).
    first_position = num_keys - num_queries + first_query
    end_key = tl.minimum(first_position + BLOCK_Q, num_keys)
    first_key = 0
    if sliding_window > 0:
        first_key = tl.maximum(first_position - sliding_window + 1, 0)
    if IS_SINGLE:
        split_keys = keys_of_split(num_keys, MIN_SPLIT_KEYS, MAX_SPLITS)
        first_key = tl.maximum(first_key, split * split_keys)
        end_key = tl.minimum(end_key, (split + 1) * split_keys)
        if first_key >= end_key:
            return

    maximum, total, accumulator = attend_keys(
        q,
        position,
        kv_cache + kv_head * HEAD_DIM,
        block_table + sequence.to(tl.int64) * table_stride,
        first_key // TILE_KEYS * TILE_KEYS,
        end_key,
        scale_log2,
        sliding_window,
        block_stride,
        value_stride,
        slot_stride,
        HEAD_DIM,
        HEAD_DIM_PADDED,
        BLOCK_SIZE,
        BLOCK_M,
        TILE_KEYS,
    )

    if IS_SINGLE:
        num_heads = tl.num_programs(1) * HEADS_PER_KV_HEAD
        partial = (sequence.to(tl.int64) * num_heads + head) * num_splits + split  # [BLOCK_M]
        tl.store(partial_max + partial, maximum, mask=is_row)
        tl.store(partial_sum + partial, total, mask=is_row)
        tl.store(
            partial_out + (partial * HEAD_DIM)[:, None] + dim[None, :],
            accumulator,
            mask=is_element,
        )
    else:
        tl.store(
            out + (token * out_stride + head * HEAD_DIM)[:, None] + dim[None, :],
            accumulator / tl.where(total > 0.0, total, 1.0)[:, None],  # rows past the end have none
            mask=is_element,
        )


@triton.jit
def merge_kernel(
    partial_out,  # [num_seqs, num_heads, num_splits, HEAD_DIM] fp32
    partial_max,  # [num_seqs, num_heads, num_splits] fp32
    partial_sum,  # [num_seqs, num_heads, num_splits] fp32
    out,  # [num_tokens, num_heads, HEAD_DIM]
    cu_seqlens_q,  # [num_seqs + 1] int32
    seqused_k,  # [num_seqs] int32
    sliding_window,
    num_splits,
    out_stride,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    MIN_SPLIT_KEYS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """The splits of a single token's keys, weighed by their softmax sums."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(cu_seqlens_q + sequence)
    if tl.load(cu_seqlens_q + sequence + 1) - token != 1:
        return
    num_keys = tl.load(seqused_k + sequence)
    first_key = 0
    if sliding_window > 0:
        first_key = tl.maximum(num_keys - sliding_window, 0)
    split = tl.arange(0, MAX_SPLITS)
    split_keys = keys_of_split(num_keys, MIN_SPLIT_KEYS, MAX_SPLITS)
    is_split = (split * split_keys < num_keys) & ((split + 1) * split_keys > first_key)

    partial = (sequence.to(tl.int64) * tl.num_programs(1) + head) * num_splits + split
    maximum = tl.load(partial_max + partial, mask=is_split, other=float("-inf"))
    weights = tl.exp2(maximum - tl.max(maximum, axis=0))
    total = tl.sum(weights * tl.load(partial_sum + partial, mask=is_split, other=0.0), axis=0)

    dim = tl.arange(0, HEAD_DIM_PADDED)
    is_element = is_split[:, None] & (dim < HEAD_DIM)[None, :]
    values = tl.load(
        partial_out + (partial * HEAD_DIM)[:, None] + dim[None, :], mask=is_element, other=0.0
    )
    result = tl.sum(values * weights[:, None], axis=0) / total
    tl.store(
        out + token.to(tl.int64) * out_stride + head * HEAD_DIM + dim, result, mask=dim < HEAD_DIM
    )
