"""A request's KV out of a worker's cache and into another's: whole blocks, layer after layer.

cache of layer l   [ b0 | b1 | b2 | b3 | ... ]      block table of the request here: 3, 0
part               [ l: b3 b0 | l+1: b3 b0 | ... ]  blocks in token order
cache over there   [ -- | b3 | b0 | ... ]           block table of the request there: 1, 2

Where the other worker may read this one's memory, it is told where the blocks lie, and copies them
from there: once, instead of into a part, through the link and out of a part again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from services.worker.links.base import Buffer, PeerMemory
from services.worker.memory.base import FileRun
from services.worker.model.runner import ModelRunner

#: Bytes of a part, about: large for a frame, small for the caches and the allocator.
PART_BYTES = 1024 * 1024
#: The same of a part that is read from the other worker's memory.
READ_PART_BYTES = 4 * 1024 * 1024

_NOTHING = np.empty(0, np.uint8)


class PartShape(NamedTuple):
    """What travels in one frame: some blocks of a request, of some layers."""

    layers: tuple[int, int]  # half-open
    blocks: tuple[int, int]  # half-open, positions in the request's block table


def cut_parts(
    start: int, end: int, num_blocks: int, block_bytes: int, part_bytes: int = PART_BYTES
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
    runner: ModelRunner, block_table: Sequence[int], start: int, end: int
) -> torch.Tensor:  # [end - start, num_blocks, *kv_block_shape]
    """A copy of the blocks `block_table` of the layers `[start, end)`."""
    index = torch.tensor(block_table, dtype=torch.int64, device=runner.device)
    part = torch.empty(
        (end - start, len(block_table), *runner.kv_block_shape),
        dtype=runner.dtype,
        device=runner.device,
    )
    for position, layer in enumerate(range(start, end)):
        torch.index_select(runner.kv_cache(layer), 0, index, out=part[position])
    return part


@torch.inference_mode()
def scatter_kv(
    runner: ModelRunner, block_table: Sequence[int], start: int, end: int, buffer: Buffer
) -> None:
    """Write what `gather_kv` read into the blocks `block_table`, in the same order.

    Raises:
        ValueError: the buffer has another size.
    """
    runner.pool.populate_kv(range(start, end), max(block_table) + 1)
    index = torch.tensor(block_table, dtype=torch.int64, device=runner.device)
    part = received_tensor(runner, buffer).view(
        end - start, len(block_table), *runner.kv_block_shape
    )
    for position, layer in enumerate(range(start, end)):
        # As a matrix: with the rows' own dimensions it takes twice as long.
        runner.kv_cache(layer).flatten(1).index_copy_(0, index, part[position].flatten(1))


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


def received_tensor(runner: ModelRunner, buffer: Buffer) -> torch.Tensor:  # [num_elements]
    """A received buffer as a tensor where the runner computes; on the CPU no copy is made.

    Raises:
        ValueError: it is empty, or not of whole elements.
    """
    return torch.frombuffer(buffer, dtype=runner.dtype).to(runner.device)


def as_buffer(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory, which the view keeps alive; a GPU's is copied to the host."""
    return tensor.cpu().view(torch.uint8).numpy().data.cast("B")
