"""Tensors over mapped memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from services.worker.memory.cpu import CpuMemory
from services.worker.memory.pool import MemoryPool
from services.worker.memory.tensors import tensor_at

CHUNK = 64 * 1024


@pytest.fixture
def pool() -> Iterator[MemoryPool]:
    made = MemoryPool(CpuMemory(4 * CHUNK, CHUNK))
    yield made
    made.close()


def test_a_tensor_is_a_view_and_not_a_copy(pool: MemoryPool) -> None:
    arena = pool.weight_arena("layer 0", CHUNK)
    first = tensor_at(arena.address, (2, 3))
    first.copy_(torch.arange(6.0).view(2, 3))
    assert tensor_at(arena.address + 8, (4,)).tolist() == [2.0, 3.0, 4.0, 5.0]
    assert first.data_ptr() == arena.address
    assert first.is_contiguous()


def test_a_tensor_is_good_again_after_drop_and_restore(pool: MemoryPool) -> None:
    arena = pool.weight_arena("layer 0", CHUNK)
    weights = tensor_at(arena.address, (CHUNK // 4,))
    pool.drop_arena("layer 0")
    pool.restore_arena("layer 0")
    weights.fill_(2.0)
    assert weights.sum().item() == 2.0 * (CHUNK // 4)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
)
def test_every_type_is_what_torch_would_read_there(pool: MemoryPool, dtype: torch.dtype) -> None:
    arena = pool.weight_arena("layer 0", CHUNK)
    bytes_there = tensor_at(arena.address, (48,), torch.uint8)
    bytes_there.copy_(torch.arange(48, dtype=torch.uint8))
    expected = bytes_there.clone().view(dtype)
    assert torch.equal(tensor_at(arena.address, (len(expected),), dtype), expected)


def test_other_types(pool: MemoryPool) -> None:
    arena = pool.weight_arena("layer 0", CHUNK)
    tensor_at(arena.address, (4,), torch.int32).copy_(torch.tensor([1, 0, 0, 0]))
    assert tensor_at(arena.address, (16,), torch.uint8)[0].item() == 1


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_a_tensor_without_elements_is_refused(pool: MemoryPool, shape: tuple[int, ...]) -> None:
    arena = pool.weight_arena("layer 0", CHUNK)
    with pytest.raises(ValueError, match="no elements"):
        tensor_at(arena.address, shape)


def test_a_misaligned_address_is_refused(pool: MemoryPool) -> None:
    arena = pool.weight_arena("layer 0", CHUNK)
    with pytest.raises(ValueError, match="not aligned"):
        tensor_at(arena.address + 2, (1,))
