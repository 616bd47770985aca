"""The kernels of CUDA workers against plain torch: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import pytest
import torch

from services.worker.kernels.ops import HeadNorms, PagedBatch
from services.worker.model.batch import SequenceSlice, make_batch
from tests.torch_ops import TorchOps
from tests.triton_device import DEVICE, DTYPES

from services.worker.kernels.cuda.ops import TritonOps  # isort: skip  (after triton_device)

BLOCK_SIZE = 16
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}

#: (tokens before the batch, tokens of the batch) of each sequence
PROMPTS = [(0, 37), (20, 5), (0, 2)]
SINGLES = [(0, 1), (255, 1), (256, 1), (530, 1)]
MIXED = [(63, 1), (0, 20), (300, 1), (270, 4), (5, 1)]


def paged_batch(slices: list[SequenceSlice], head_dim: int) -> PagedBatch:
    batch = make_batch(slices, BLOCK_SIZE).to(DEVICE)
    angles = torch.randn(len(batch.token_ids), head_dim // 2).repeat(1, 2).to(DEVICE)
    return PagedBatch.of(batch, angles.cos(), angles.sin())


@dataclass(frozen=True)
class Pages:
    """Sequences with random KV in shuffled blocks; what is not stored is NaN."""

    batch: PagedBatch
    kv_cache: torch.Tensor

    @classmethod
    def make(
        cls,
        sequences: list[tuple[int, int]],
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> Self:
        torch.manual_seed(5)
        ends = [start + length for start, length in sequences]
        counts = [-(-end // BLOCK_SIZE) for end in ends]
        blocks = torch.randperm(sum(counts) + 1)
        tables = [part.tolist() for part in blocks[:-1].split(counts)]
        cache = torch.full((len(blocks), 2, BLOCK_SIZE, num_kv_heads, head_dim), torch.nan)
        for table, end in zip(tables, ends, strict=True):
            slots = torch.arange(end)
            pages = torch.tensor(table)[slots // BLOCK_SIZE]
            cache[pages, :, slots % BLOCK_SIZE] = torch.randn(end, 2, num_kv_heads, head_dim)
        slices = [
            SequenceSlice([1] * length, start, table, True)
            for (start, length), table in zip(sequences, tables, strict=True)
        ]
        return cls(paged_batch(slices, head_dim), cache.to(DEVICE, dtype))


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequences", [PROMPTS, SINGLES, MIXED], ids=["prompts", "singles", "both"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"), [(4, 2, 32, 0), (7, 1, 16, 0), (2, 2, 80, 40)]
)
def test_attention_is_that_of_torch(
    sequences: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    dtype: torch.dtype,
) -> None:
    pages = Pages.make(sequences, kv_heads, head_dim, dtype)
    qkv = random(len(pages.batch.slot_mapping), heads + 1, head_dim, dtype=dtype)
    query = qkv[:, :heads]  # tokens lie further apart than their heads take
    actual = torch.full(query.shape, torch.nan, device=DEVICE, dtype=dtype)
    expected = torch.empty_like(actual)
    for ops, out in ((TritonOps(), actual), (TorchOps(), expected)):
        ops.attention(query, pages.kv_cache, pages.batch, head_dim**-0.5, window, out)
    assert_close(actual, expected)


def test_a_long_sequence_is_divided_more_coarsely() -> None:
    """Past 32 splits of 256 keys they grow, for that sequence alone."""
    pages = Pages.make([(8200, 1), (300, 1)], 1, 16, torch.float32)
    query = random(2, 2, 16, dtype=torch.float32)
    actual, expected = torch.empty_like(query), torch.empty_like(query)
    for ops, out in ((TritonOps(), actual), (TorchOps(), expected)):
        ops.attention(query, pages.kv_cache, pages.batch, 0.25, 0, out)
    assert_close(actual, expected)


def test_a_single_token_has_the_same_bits_alone_and_in_any_batch() -> None:
    pages = Pages.make(MIXED, 2, 32, torch.float32)
    query = random(len(pages.batch.slot_mapping), 4, 32, dtype=torch.float32)
    together, alone = torch.empty_like(query), torch.empty_like(query[:1])
    ops = TritonOps()
    ops.attention(query, pages.kv_cache, pages.batch, 0.2, 0, together)
    table = pages.batch.block_table[2].tolist()
    batch = paged_batch([SequenceSlice([1], 300, table, True)], 32)
    row = int(pages.batch.cu_seqlens_q[2])
    ops.attention(query[row : row + 1], pages.kv_cache, batch, 0.2, 0, alone)
    assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
def test_rope_and_store_is_that_of_torch(dtype: torch.dtype, has_norms: bool) -> None:
    heads, kv_heads, head_dim = 3, 2, 48
    pages = Pages.make([(18, 1), (0, 3)], kv_heads, head_dim, dtype)
    num_tokens = len(pages.batch.slot_mapping)
    pages.batch.slot_mapping[1] = -1
    query_norm, key_norm = random(head_dim, dtype=dtype), random(head_dim, dtype=dtype)
    norms = HeadNorms(query_norm, key_norm, 1e-5) if has_norms else None
    qkv = random(num_tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    results = []
    for ops in (TritonOps(), TorchOps()):
        own_qkv, own_cache = qkv.clone(), pages.kv_cache.clone()
        ops.rope_and_store(own_qkv, pages.batch, norms, own_cache)
        results.append((own_qkv[:, : heads * head_dim], own_cache))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 80])
def test_keys_and_values_are_stored_where_torch_stores_them(
    dtype: torch.dtype, head_dim: int
) -> None:
    kv_heads = 3
    pages = Pages.make([(18, 1), (0, 3)], kv_heads, head_dim, dtype)
    slots = pages.batch.slot_mapping
    slots[1] = -1
    key = random(kv_heads, len(slots), head_dim, dtype=dtype).transpose(0, 1)  # head by head
    value = random(len(slots), 2 * kv_heads, head_dim, dtype=dtype)[:, kv_heads:]  # between others
    caches = []
    for ops in (TritonOps(), TorchOps()):
        caches.append(pages.kv_cache.clone())
        ops.store_kv(key, value, slots, caches[-1])
    torch.testing.assert_close(*caches, atol=0.0, rtol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_activation_are_those_of_torch(dtype: torch.dtype) -> None:
    x, weight = random(5, 96, dtype=dtype), random(96, dtype=dtype)
    gate_up = random(3, 2 * 1100, dtype=dtype)
    results = []
    for ops in (TritonOps(), TorchOps()):
        normed, activated = torch.empty_like(x), gate_up.new_empty(3, 1100)
        ops.rms_norm(x, weight, 1e-5, normed)
        ops.silu_mul(gate_up, activated)
        results.append((normed, activated))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)
