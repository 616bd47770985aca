"""Blocks that travel, in one launch: on a GPU, or interpreted on the CPU, against plain torch."""

from __future__ import annotations

import pytest
import torch

from services.worker.kernels import blocks
from tests.triton_device import DEVICE

from services.worker.kernels.cuda.ops import TritonOps  # isort: skip  (after triton_device)

#: Of one block: smaller than a tile of the kernel, more than one, and whole tiles.
SHAPES = [(2, 16, 1, 8), (2, 16, 5, 16), (2, 16, 8, 128)]


def random_caches(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """KV of three layers of nine blocks; any bytes, NaN among them."""
    num_bytes = 9 * torch.Size(shape).numel() * dtype.itemsize
    return [
        torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
        .to(DEVICE)
        .view(dtype)
        .view(9, *shape)
        for _ in range(3)
    ]


def as_bytes(caches: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([cache.flatten().view(torch.uint8) for cache in caches])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("table", [[4], [8, 0, 3, 3], list(range(9))])
def test_blocks_of_all_layers_are_gathered_and_scattered(
    shape: tuple[int, ...], dtype: torch.dtype, table: list[int]
) -> None:
    source, ops = random_caches(shape, dtype), TritonOps()
    num_bytes = 3 * len(table) * torch.Size(shape).numel() * dtype.itemsize
    expected = torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE)
    actual = torch.empty_like(expected)
    blocks.gather_blocks(source, table, expected)
    ops.gather_blocks(source, table, actual)
    assert torch.equal(actual, expected)

    places = list(range(len(table)))[::-1]
    target, twin = random_caches(shape, dtype), random_caches(shape, dtype)
    for one, other in zip(target, twin, strict=True):
        one.copy_(other)
    blocks.scatter_blocks(twin, places, expected)
    ops.scatter_blocks(target, places, expected)
    assert torch.equal(as_bytes(target), as_bytes(twin))


def test_a_part_of_another_size_is_refused() -> None:
    caches = random_caches(SHAPES[0], torch.float32)
    part = torch.empty(100, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="blocks of 3 layers"):
        TritonOps().gather_blocks(caches, [1, 2], part)
