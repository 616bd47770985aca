"""A request's KV out of a worker's cache and into another's: whole blocks, layer after layer.

cache of layer l   [ b0 | b1 | b2 | b3 | ... ]      block table of the request here: 3, 0
part               [ l: b3 b0 | l+1: b3 b0 | ... ]  blocks in token order
cache over there   [ -- | b3 | b0 | ... ]           block table of the request there: 1, 2

A part is written straight into the place it is sent from and read from where it arrived: memory of
the link's channel, on a GPU a slot in the other GPU's memory.

Where the other worker may read this one's memory, it is told where the blocks lie, and copies them
from there: once, instead of into a part, through the link and out of a part again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from services.worker.links.base import PeerMemory
from services.worker.memory.base import FileRun
from services.worker.model.runner import ModelRunner

#: Bytes of a part that is read from the other worker's memory, about.
READ_PART_BYTES = 4 * 1024 * 1024

_NOTHING = np.empty(0, np.uint8)


class PartShape(NamedTuple):
    """What travels in one frame: some blocks of a request, of some layers."""

    layers: tuple[int, int]  # half-open
    blocks: tuple[int, int]  # half-open, positions in the request's block table


def cut_parts(
    start: int, end: int, num_blocks: int, block_bytes: int, part_bytes: int
) -> list[PartShape]:
    """Cut `num_blocks` blocks of the layers `[start, end)`: several layers, or a part of one."""
    layer_bytes = num_blocks * block_bytes
    if layer_bytes <= part_bytes:
        step = part_bytes // layer_bytes
        return [PartShape(layers, (0, num_blocks)) for layers in _runs(start, end, step)]
    step = max(1, part_bytes // block_bytes)
    return [
        PartShape((layer, layer + 1), blocks)
        for layer in range(start, end)
        for blocks in _runs(0, num_blocks, step)
    ]


def _runs(start: int, end: int, step: int) -> list[tuple[int, int]]:
    return [(first, min(first + step, end)) for first in range(start, end, step)]


@torch.inference_mode()
def gather_kv(
    runner: ModelRunner,
    block_table: Sequence[int],
    start: int,
    end: int,
    part: torch.Tensor,  # [(end - start) * num_blocks * kv_block_bytes] uint8
) -> None:
    """Copy the blocks `block_table` of the layers `[start, end)` to `part`."""
    runner.kernels.gather_blocks(_caches(runner, start, end), block_table, part)


@torch.inference_mode()
def scatter_kv(
    runner: ModelRunner,
    block_table: Sequence[int],
    start: int,
    end: int,
    part: torch.Tensor,  # as above
) -> None:
    """Write what `gather_kv` read into the blocks `block_table`, in the same order.

    Raises:
        ValueError: the part has another size.
    """
    if part.nbytes != (end - start) * len(block_table) * runner.kv_block_bytes:
        raise ValueError(f"a part of {part.nbytes} bytes is not {len(block_table)} blocks")
    runner.pool.populate_kv(range(start, end), max(block_table) + 1)
    runner.kernels.scatter_blocks(_caches(runner, start, end), block_table, part)


def _caches(runner: ModelRunner, start: int, end: int) -> list[torch.Tensor]:
    return [runner.kv_cache(layer) for layer in range(start, end)]


def locate_kv(
    runner: ModelRunner, block_table: Sequence[int], start: int, end: int
) -> list[FileRun]:
    """Where what `gather_kv` would read lies in the worker's file, in the same order."""
    neighbours = _neighbours(block_table)
    return [
        run
        for layer in range(start, end)
        for first, last in neighbours
        for run in runner.pool.locate_kv(layer, first, last)
    ]


def read_kv(
    runner: ModelRunner,
    block_table: Sequence[int],
    start: int,
    end: int,
    memory: PeerMemory,
    sources: Sequence[FileRun],
) -> None:
    """Write what another worker has at `sources` into the blocks `block_table`, in the same order.

    Raises:
        ValueError: the sources have another size, or are not in its memory.
    """
    runner.pool.populate_kv(range(start, end), max(block_table) + 1)
    neighbours = _neighbours(block_table)
    targets = [
        _bytes_of(runner.kv_cache(layer), first, last)
        for layer in range(start, end)
        for first, last in neighbours
    ]
    copy_runs(targets, [memory.view(run) for run in sources])


def copy_runs(targets: Sequence[NDArray[np.uint8]], sources: Sequence[NDArray[np.uint8]]) -> None:
    """Copy bytes from one list of pieces to another that is cut in other places.

    Raises:
        ValueError: the one has more bytes than the other.
    """
    if sum(map(len, targets)) != sum(map(len, sources)):
        raise ValueError("what is to be copied has another size than its place")
    waiting, source = iter(sources), _NOTHING
    for target in targets:
        while len(target):
            if not len(source):
                source = next(waiting)
            nbytes = min(len(target), len(source))
            np.copyto(target[:nbytes], source[:nbytes])
            target, source = target[nbytes:], source[nbytes:]


def _neighbours(block_table: Sequence[int]) -> list[tuple[int, int]]:
    """Runs `[first, last)` of blocks that follow each other in the table and in the cache."""
    runs: list[tuple[int, int]] = []
    for block in block_table:
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs


def _bytes_of(cache: torch.Tensor, first: int, last: int) -> NDArray[np.uint8]:
    """Blocks `[first, last)` of a layer's KV on the CPU."""
    blocks: NDArray[np.uint8] = cache[first:last].view(torch.uint8).flatten().numpy()
    return blocks
