"""What moving 200 MiB of chunks from weights to KV costs on this machine, without any worker."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.worker.memory.cpu import CpuMemory
from services.worker.memory.pool import KvRegion, MemoryPool

MIB = 1024 * 1024
NUM_BYTES = 200 * MIB
_CHUNK_BYTES = MIB // 2
_NUM_LAYERS = 15
_BLOCK_BYTES = 24 * 1024
_ARENA_BYTES = -(-NUM_BYTES // _NUM_LAYERS // _CHUNK_BYTES) * _CHUNK_BYTES
_ROUNDS = 5

Act = Callable[[MemoryPool, Sequence[KvRegion]], None]


@dataclass(frozen=True, slots=True)
class MemoryFinding:
    """Seconds for `NUM_BYTES` in the arenas of 15 layers; the best of some rounds.

    Attributes:
        remap: until the KV of the other 15 layers has the chunks: what a commit waits for.
        populate: until every page of them is there, in pieces, before its first use.
        unmap: taking the old mappings away, later.
        first_touch: writing to each page for the first time instead, had it not been populated.
        touch: the same again.
    """

    remap: float
    populate: float
    unmap: float
    first_touch: float
    touch: float


def measure_memory() -> MemoryFinding:
    """Drop and restore, several times."""
    served = [_measure(_populate, _unmap) for _ in range(_ROUNDS)]
    touched = [_measure(_touch, _touch) for _ in range(_ROUNDS)]
    remap, populate, unmap = map(min, *served)
    _, first_touch, touch = map(min, *touched)
    return MemoryFinding(remap, populate, unmap, first_touch, touch)


def _measure(*acts: Act) -> list[float]:
    """Seconds of a remap, and of what is done after it."""
    pool = MemoryPool(CpuMemory(2 * _NUM_LAYERS * _ARENA_BYTES, _CHUNK_BYTES))
    arenas = [pool.weight_arena(f"layer {i}", _ARENA_BYTES) for i in range(2 * _NUM_LAYERS)]
    regions = [pool.kv_region(i, _BLOCK_BYTES) for i in range(_NUM_LAYERS)]
    for arena in arenas:
        ctypes.memset(arena.address, 1, arena.nbytes)
    figures = [_seconds(act, pool, regions) for act in (_remap, *acts)]
    pool.close()
    return figures


def _remap(pool: MemoryPool, regions: Sequence[KvRegion]) -> None:
    for layer in range(_NUM_LAYERS, 2 * _NUM_LAYERS):
        pool.drop_arena(f"layer {layer}")
    pool.grow_kv_evenly([region.layer for region in regions])


def _populate(pool: MemoryPool, regions: Sequence[KvRegion]) -> None:
    layers = [region.layer for region in regions]
    pool.populate_kv(layers, pool.num_kv_blocks(layers))


def _unmap(pool: MemoryPool, regions: Sequence[KvRegion]) -> None:
    pool.unmap_stale(pool.stale_bytes)


def _touch(pool: MemoryPool, regions: Sequence[KvRegion]) -> None:
    for region in regions:
        for offset in range(0, _ARENA_BYTES, mmap.PAGESIZE):
            ctypes.c_byte.from_address(region.address + offset).value = 1


def _seconds(act: Act, pool: MemoryPool, regions: Sequence[KvRegion]) -> float:
    began_at = time.perf_counter()
    act(pool, regions)
    return time.perf_counter() - began_at
