"""Blocks of many layers' KV into one run of bytes and back, in plain torch.

    caches     layer 0 [ b0 | b1 | b2 | b3 ]    layer 1 [ b0 | b1 | b2 | b3 ]       table 3, 0
    part       [ layer 0: b3 b0 | layer 1: b3 b0 ]

What CPU kernels do, and the oracle of the kernels in `cuda/blocks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def gather_blocks(
    caches: Sequence[torch.Tensor],  # of each layer [blocks, ...]; only mapped blocks are touched
    block_table: Sequence[int],
    part: torch.Tensor,  # [num_layers * num_blocks * block_bytes] uint8
) -> None:
    """Copy the blocks `block_table` of each layer to `part`."""
    index = torch.tensor(block_table, dtype=torch.int64, device=part.device)
    for cache, place in _rows(caches, block_table, part):
        torch.index_select(cache, 0, index, out=place)


def scatter_blocks(
    caches: Sequence[torch.Tensor],  # as above
    block_table: Sequence[int],
    part: torch.Tensor,  # as above
) -> None:
    """Copy `part` to the blocks `block_table` of each layer."""
    index = torch.tensor(block_table, dtype=torch.int64, device=part.device)
    for cache, place in _rows(caches, block_table, part):
        cache.index_copy_(0, index, place)


def _rows(
    caches: Sequence[torch.Tensor], block_table: Sequence[int], part: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cache and place of each layer, as matrices: with dimensions of its own a row takes longer."""
    places = part.view(len(caches), len(block_table), -1)
    return [
        (cache.flatten(1), place.view(cache.dtype))
        for cache, place in zip(caches, places, strict=True)
    ]
