"""Slow, obvious reference computations that tests and benchmarks compare the real ones with."""

from __future__ import annotations

import torch


def gather_keys_and_values(
    kv: torch.Tensor,  # [blocks, 2, block_size, kv_heads, head_dim]
    blocks: torch.Tensor,  # [num_blocks] int32
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence's K and V, each [kv_heads, length, head_dim]."""
    pages = kv[blocks.long()]
    keys, values = pages[:, 0].flatten(0, 1), pages[:, 1].flatten(0, 1)
    return keys[:length].transpose(0, 1), values[:length].transpose(0, 1)


def visible(q_len: int, length: int, sliding_window: int) -> torch.Tensor:
    """[q_len, length] bool: which keys the last q_len positions of a sequence see."""
    query = torch.arange(length - q_len, length)[:, None]
    key = torch.arange(length)[None, :]
    seen = key <= query
    return seen & (key > query - sliding_window) if sliding_window else seen


def paged_attention(
    q: torch.Tensor,  # [num_tokens, num_heads, head_dim]
    kv: torch.Tensor,  # [blocks, 2, block_size, kv_heads, head_dim]
    block_table: torch.Tensor,  # [num_seqs, max_blocks]
    cu_seqlens_q: torch.Tensor,  # [num_seqs + 1]
    seqused_k: torch.Tensor,  # [num_seqs]
    scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    """Gather, then scaled_dot_product_attention, sequence by sequence. Same shape as q."""
    out = torch.empty_like(q)
    block_size = kv.shape[2]
    for s, length in enumerate(seqused_k.tolist()):
        tokens = slice(int(cu_seqlens_q[s]), int(cu_seqlens_q[s + 1]))
        blocks = block_table[s, : -(-length // block_size)]
        keys, values = gather_keys_and_values(kv, blocks, length)
        query = q[tokens].transpose(0, 1)
        out[tokens] = torch.nn.functional.scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            attn_mask=visible(query.shape[1], length, sliding_window)[None, None],
            scale=scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
    return out
