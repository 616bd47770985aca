"""Norm, rotary embedding, KV store and gated activation, in Triton.

Arithmetic is fp32; results are rounded where Hugging Face's modules round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.worker.kernels.ops import HeadNorms, PagedBatch

_ACTIVATION_TILE = 1024


def rms_norm(
    x: torch.Tensor,  # [rows, size]
    weight: torch.Tensor,  # [size]
    eps: float,
    out: torch.Tensor,  # [rows, size]
) -> None:
    """out = x / sqrt(mean(x ** 2) + eps) * weight, row by row."""
    rows, size = x.shape
    rms_norm_kernel[(rows,)](
        x,
        weight,
        eps,
        out,
        x.stride(0),
        out.stride(0),
        SIZE=size,
        SIZE_PADDED=triton.next_power_of_2(size),
        num_warps=8,
    )


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:  # [rows, 2 size], [rows, size]
    """out = silu(gate) * up, where gate_up is [gate | up] in each row."""
    rows, size = out.shape
    silu_mul_kernel[(rows, triton.cdiv(size, _ACTIVATION_TILE))](
        gate_up, out, SIZE=size, TILE=_ACTIVATION_TILE, num_warps=4
    )


def rope_and_store(
    qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 num_kv_heads) * head_dim], q batch in place
    kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
    batch: PagedBatch,
    norms: HeadNorms | None,
) -> None:
    """(Normalise and) rotate q and k, and store k and v at their slots of the layer's KV."""
    num_tokens, width = qkv.shape
    _, _, block_size, num_kv_heads, head_dim = kv_cache.shape
    num_rows = width // head_dim
    rope_and_store_kernel[(num_tokens, num_rows)](
        qkv,
        kv_cache,
        batch.slot_mapping,
        batch.cos,
        batch.sin,
        qkv if norms is None else norms.query,
        qkv if norms is None else norms.key,
        0.0 if norms is None else norms.eps,
        qkv.stride(0),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        NUM_HEADS=num_rows - 2 * num_kv_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        HALF_PADDED=triton.next_power_of_2(head_dim // 2),
        BLOCK_SIZE=block_size,
        HAS_NORM=norms is not None,
        num_warps=1,
    )


def store_kv(
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim], strided; heads are contiguous
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]; likewise
    slot_mapping: torch.Tensor,  # [num_tokens] int64
    kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
) -> None:
    """Store k and v at their slots of the layer's KV."""
    num_tokens, num_kv_heads, head_dim = key.shape
    store_kv_kernel[(num_tokens, num_kv_heads)](
        key,
        value,
        kv_cache,
        slot_mapping,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=kv_cache.shape[2],
        num_warps=1,
    )


@triton.jit
def rms_norm_kernel(
    x,
    weight,
    eps,
    out,
    x_stride,
    out_stride,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
):
    """One row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE_PADDED)
    is_column = column < SIZE
    loaded = tl.load(x + row * x_stride + column, mask=is_column, other=0.0)
    values = loaded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / SIZE + eps)
    factors = tl.load(weight + column, mask=is_column, other=0.0)
    result = (values * scale).to(loaded.dtype) * factors
    tl.store(out + row * out_stride + column, result, mask=is_column)


@triton.jit
def silu_mul_kernel(gate_up, out, SIZE: tl.constexpr, TILE: tl.constexpr):
    """A part of one row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_column = column < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + column, mask=is_column, other=0.0)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + column, mask=is_column, other=0.0)
    values = gate.to(tl.float32)
    activated = (values / (1.0 + tl.exp(-values))).to(gate.dtype)
    tl.store(out + row * SIZE + column, activated * up, mask=is_column)


@triton.jit
def rope_and_store_kernel(
    qkv,
    kv_cache,
    slot_mapping,
    cos,
    sin,
    q_norm,
    k_norm,
    eps,
    qkv_stride,
    block_stride,
    value_stride,
    slot_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """One head of one token per program: first those of q, then of k, then of v."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half = tl.arange(0, HALF_PADDED)
    is_half = half < HALF
    source = qkv + token * qkv_stride + head * 2 * HALF + half
    low = tl.load(source, mask=is_half, other=0.0)
    high = tl.load(source + HALF, mask=is_half, other=0.0)

    if head < NUM_HEADS + NUM_KV_HEADS:
        dtype = low.dtype
        x = low.to(tl.float32)
        y = high.to(tl.float32)
        if HAS_NORM:
            norm = q_norm
            if head >= NUM_HEADS:
                norm = k_norm
            scale = tl.rsqrt((tl.sum(x * x, axis=0) + tl.sum(y * y, axis=0)) / (2 * HALF) + eps)
            x_factors = tl.load(norm + half, mask=is_half, other=0.0)
            y_factors = tl.load(norm + HALF + half, mask=is_half, other=0.0)
            x = ((x * scale).to(dtype) * x_factors).to(tl.float32)
            y = ((y * scale).to(dtype) * y_factors).to(tl.float32)
        c = tl.load(cos + token * 2 * HALF + half, mask=is_half, other=0.0)
        s = tl.load(sin + token * 2 * HALF + half, mask=is_half, other=0.0)
        low = (x * c - y * s).to(dtype)
        high = (y * c + x * s).to(dtype)

    if head < NUM_HEADS:
        tl.store(source, low, mask=is_half)
        tl.store(source + HALF, high, mask=is_half)
    else:
        slot = tl.load(slot_mapping + token)
        kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
        is_value = head >= NUM_HEADS + NUM_KV_HEADS
        target = keys_of_slot(kv_cache, slot, block_stride, slot_stride, BLOCK_SIZE)
        target += is_value.to(tl.int64) * value_stride + kv_head * 2 * HALF
        is_stored = is_half & (slot >= 0)
        tl.store(target + half, low, mask=is_stored)
        tl.store(target + HALF + half, high, mask=is_stored)


@triton.jit
def store_kv_kernel(
    key,
    value,
    kv_cache,
    slot_mapping,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    block_stride,
    value_stride,
    slot_stride,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """One KV head of one token per program, its key and its value."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    slot = tl.load(slot_mapping + token)
    is_stored = (dim < HEAD_DIM) & (slot >= 0)
    k = tl.load(key + token * key_token_stride + head * key_head_stride + dim, mask=is_stored)
    v = tl.load(value + token * value_token_stride + head * value_head_stride + dim, mask=is_stored)
    target = keys_of_slot(kv_cache, slot, block_stride, slot_stride, BLOCK_SIZE)
    target += head * HEAD_DIM + dim
    tl.store(target, k, mask=is_stored)
    tl.store(target + value_stride, v, mask=is_stored)


@triton.jit
def keys_of_slot(kv_cache, slot, block_stride, slot_stride, BLOCK_SIZE: tl.constexpr):
    """Where the keys of a slot begin; its values lie `value_stride` further on."""
    return kv_cache + slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * slot_stride
