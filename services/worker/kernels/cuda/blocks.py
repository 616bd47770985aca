"""Blocks of many layers' KV into one run of bytes and back, in one launch each way.

    addresses | of layer 0's cache | of layer 1's cache | ... |        one table, from the host
    blocks    | 3 | 0 | ... |
    part      [ layer 0: b3 b0 ... | layer 1: b3 b0 ... | ... ]        here or in a peer's memory

A program copies a tile of one block of one layer. Bytes are bytes: they are moved as words of 64
bits, whatever their type.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_WORD_BYTES = 8
_TILE_WORDS = 1024


def gather_blocks(
    caches: Sequence[torch.Tensor],  # of each layer [blocks, ...]; only mapped blocks are touched
    block_table: Sequence[int],
    part: torch.Tensor,  # [num_layers * num_blocks * block_bytes] uint8
) -> None:
    """Copy the blocks `block_table` of each layer to `part`."""
    _launch(caches, block_table, part, gathers=True)


def scatter_blocks(
    caches: Sequence[torch.Tensor],  # as above
    block_table: Sequence[int],
    part: torch.Tensor,  # as above
) -> None:
    """Copy `part` to the blocks `block_table` of each layer."""
    _launch(caches, block_table, part, gathers=False)


def _launch(
    caches: Sequence[torch.Tensor], block_table: Sequence[int], part: torch.Tensor, *, gathers: bool
) -> None:
    """Nothing here waits for the device: the table goes there from pinned memory."""
    block_bytes = caches[0].stride(0) * caches[0].element_size()
    if block_bytes % _WORD_BYTES or part.nbytes != len(caches) * len(block_table) * block_bytes:
        raise ValueError(f"{part.nbytes} bytes are not the blocks of {len(caches)} layers")
    numbers = [*(cache.data_ptr() for cache in caches), *block_table]
    is_cuda = part.device.type == "cuda"
    table = torch.tensor(numbers, dtype=torch.int64, pin_memory=is_cuda)
    table = table.to(part.device, non_blocking=True)
    block_words = block_bytes // _WORD_BYTES
    grid = (triton.cdiv(block_words, _TILE_WORDS), len(block_table), len(caches))
    copy_blocks_kernel[grid](
        table,
        part.view(torch.int64),
        block_words,
        GATHERS=gathers,
        TILE=_TILE_WORDS,
        num_warps=4,
    )


@triton.jit
def copy_blocks_kernel(table, part, block_words, GATHERS: tl.constexpr, TILE: tl.constexpr):
    """A tile of one block of one layer per program."""
    word = tl.program_id(0) * TILE + tl.arange(0, TILE)
    index = tl.program_id(1)
    layer = tl.program_id(2)
    is_word = word < block_words
    address = tl.load(table + layer).to(tl.pointer_type(tl.int64))
    block = tl.load(table + tl.num_programs(2) + index)
    cache = tl.multiple_of(address, 16) + block * block_words + word
    row = (layer * tl.num_programs(1) + index).to(tl.int64)
    place = part + row * block_words + word
    if GATHERS:
        tl.store(place, tl.load(cache, mask=is_word), mask=is_word)
    else:
        tl.store(cache, tl.load(place, mask=is_word), mask=is_word)
