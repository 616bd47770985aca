"""What moving 200 MiB of chunks from weights to KV costs on this machine, without any worker."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass

from services.worker.memory.cpu import CpuMemory
from services.worker.memory.pool import MemoryPool

MIB = 1024 * 1024
NUM_BYTES = 200 * MIB
_CHUNK_BYTES = MIB // 2
_NUM_LAYERS = 15
_BLOCK_BYTES = 24 * 1024
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class MemoryFinding:
    """Seconds for `NUM_BYTES` in the arenas of 15 layers; the best of some rounds.

    Attributes:
        remap: until the KV of the other 15 layers has the chunks: what a commit waits for.
        first_touch: writing to each page of what was mapped, for the first time.
        touch: the same again.
        unmap: taking the old mappings away, later.
    """

    remap: float
    first_touch: float
    touch: float
    unmap: float


def measure_memory() -> MemoryFinding:
    """Drop and restore, several times."""
    rounds = [_measure_once() for _ in range(_ROUNDS)]
    return MemoryFinding(*map(min, *rounds))


def _measure_once() -> tuple[float, float, float, float]:
    arena_bytes = -(-NUM_BYTES // _NUM_LAYERS // _CHUNK_BYTES) * _CHUNK_BYTES
    pool = MemoryPool(CpuMemory(2 * _NUM_LAYERS * arena_bytes, _CHUNK_BYTES))
    arenas = [pool.weight_arena(f"layer {i}", arena_bytes) for i in range(2 * _NUM_LAYERS)]
    regions = [pool.kv_region(i, _BLOCK_BYTES) for i in range(_NUM_LAYERS)]
    for arena in arenas:
        ctypes.memset(arena.address, 1, arena.nbytes)

    def remap() -> None:
        for arena in arenas[_NUM_LAYERS:]:
            pool.drop_arena(arena.name)
        pool.grow_kv_evenly(range(_NUM_LAYERS))

    def touch() -> None:
        for region in regions:
            for offset in range(0, arena_bytes, mmap.PAGESIZE):
                ctypes.c_byte.from_address(region.address + offset).value = 1

    def unmap() -> None:
        pool.unmap_stale(pool.stale_bytes)

    figures = [_seconds(act) for act in (remap, touch, touch, unmap)]
    pool.close()
    return figures[0], figures[1], figures[2], figures[3]


def _seconds(act: Callable[[], None]) -> float:
    began_at = time.perf_counter()
    act()
    return time.perf_counter() - began_at
