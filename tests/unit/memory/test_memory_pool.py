"""Dropping layers grows the KV of the others in place, restoring brings them back."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.worker.memory.base import ChunkRun, VirtualRange
from services.worker.memory.cpu import CpuMemory
from services.worker.memory.errors import DeviceMemoryError, OutOfChunksError
from services.worker.memory.pool import KvRegion, MemoryPool
from tests.memory_access import is_accessible

CHUNK = 64 * 1024
BLOCK = 24 * 1024  # blocks do not end where chunks do
NUM_LAYERS = 4
ARENA = 2 * CHUNK - 1000


def _fill_block(region: KvRegion, block: int, value: int) -> None:
    ctypes.memset(region.address + block * BLOCK, value, BLOCK)


def _block(region: KvRegion, block: int) -> bytes:
    return ctypes.string_at(region.address + block * BLOCK, BLOCK)


class Model:
    """A pool with the arenas and KV ranges of a small model."""

    def __init__(self, num_chunks: int) -> None:
        self.memory = CpuMemory(num_chunks * CHUNK, CHUNK)
        self.pool = MemoryPool(self.memory)
        layers = range(NUM_LAYERS)
        self.arenas = [self.pool.weight_arena(f"layer {i}", ARENA) for i in layers]
        self.regions = [self.pool.kv_region(i, BLOCK) for i in layers]


@pytest.fixture
def model() -> Iterator[Model]:
    made = Model(16)
    yield made
    made.pool.close()


def test_the_kv_gets_what_the_weights_leave(model: Model) -> None:
    assert model.pool.grow_kv_evenly(range(NUM_LAYERS)) == 2 * CHUNK // BLOCK
    usage = model.pool.usage
    assert (usage.weight_bytes, usage.kv_bytes, usage.free_bytes) == (8 * CHUNK, 8 * CHUNK, 0)
    model.pool.check_integrity()


def test_drop_grows_the_remaining_layers_at_their_tail(model: Model) -> None:
    pool, kept = model.pool, (0, 1)
    before = pool.grow_kv_evenly(range(NUM_LAYERS))
    for block in range(before):
        for region in model.regions:
            _fill_block(region, block, 10 * block + region.layer + 1)

    for layer in (2, 3):
        pool.drop_arena(f"layer {layer}")
    pool.shrink_kv((2, 3), 0)
    after = pool.grow_kv_evenly(kept)

    assert after == (2 + 4) * CHUNK // BLOCK
    assert pool.usage.free_bytes == 0
    for layer in kept:
        region = model.regions[layer]
        _fill_block(region, after - 1, 255)  # all of the new memory can be written
        for block in range(before):
            assert _block(region, block) == bytes([10 * block + layer + 1]) * BLOCK
    pool.check_integrity()


def test_restore_brings_the_weights_back_at_the_same_addresses(model: Model) -> None:
    pool, everything = model.pool, range(NUM_LAYERS)
    blocks = pool.grow_kv_evenly(everything)
    _fill_block(model.regions[0], blocks - 1, 7)
    pool.drop_arena("layer 3")
    pool.shrink_kv((3,), 0)
    pool.grow_kv_evenly((0, 1, 2))
    assert not pool.is_mapped("layer 3")
    with pytest.raises(OutOfChunksError):
        pool.restore_arena("layer 3")

    pool.shrink_kv((0, 1, 2), blocks)
    pool.restore_arena("layer 3")

    assert pool.is_mapped("layer 3")
    ctypes.memset(model.arenas[3].address, 1, ARENA)
    assert pool.grow_kv_evenly(everything) == blocks
    assert _block(model.regions[0], blocks - 1) == bytes([7]) * BLOCK
    pool.check_integrity()


def test_the_whole_budget_can_be_the_kv_of_one_layer(model: Model) -> None:
    for layer in range(NUM_LAYERS):
        model.pool.drop_arena(f"layer {layer}")
    blocks = model.pool.grow_kv_evenly((1,))
    assert blocks == 16 * CHUNK // BLOCK
    _fill_block(model.regions[1], blocks - 1, 3)


def test_dropping_and_restoring_twice_changes_nothing(model: Model) -> None:
    model.pool.restore_arena("layer 0")
    model.pool.drop_arena("layer 0")
    free = model.pool.usage.free_bytes
    model.pool.drop_arena("layer 0")
    assert model.pool.usage.free_bytes == free
    model.pool.check_integrity()


def test_shrinking_keeps_the_chunk_of_the_last_block(model: Model) -> None:
    model.pool.grow_kv_evenly((0,))
    _fill_block(model.regions[0], 2, 9)  # bytes [48 KiB, 72 KiB): reaches into the second chunk
    model.pool.shrink_kv((0,), 3)
    assert model.pool.usage.kv_bytes == 2 * CHUNK
    assert _block(model.regions[0], 2) == bytes([9]) * BLOCK


def test_resident_memory_never_exceeds_the_budget_and_trimming_gives_free_chunks_back(
    model: Model,
) -> None:
    pool = model.pool
    for arena in model.arenas:
        ctypes.memset(arena.address, 1, 2 * CHUNK)
    pool.drop_arena("layer 0")
    pool.drop_arena("layer 1")
    assert model.memory.resident_bytes == 8 * CHUNK
    pool.grow_kv_evenly((2,))
    for block in range(pool.num_kv_blocks((2,))):
        _fill_block(model.regions[2], block, 5)
    assert model.memory.resident_bytes <= pool.budget_bytes
    pool.shrink_kv((2,), 0)
    pool.trim()
    assert model.memory.resident_bytes == 4 * CHUNK
    assert ctypes.string_at(model.arenas[3].address, 4) == b"\x01" * 4


def test_an_arena_is_found_in_the_file(model: Model) -> None:
    pool, file = model.pool, model.memory.shareable_file
    arena = model.arenas[1]
    ctypes.memmove(arena.address, bytes(range(250)) * 500, ARENA)
    runs = pool.locate_arena("layer 1", 100, ARENA)
    found = b"".join(os.pread(file, nbytes, offset) for offset, nbytes in runs)
    assert found == ctypes.string_at(arena.address + 100, ARENA - 100)
    with pytest.raises(ValueError, match="not mapped"):
        pool.locate_arena("layer 1", 0, 2 * CHUNK + 1)
    pool.drop_arena("layer 1")
    with pytest.raises(ValueError, match="not mapped"):
        pool.locate_arena("layer 1", 0, ARENA)


def test_chunks_change_hands_before_their_old_mapping_goes(model: Model) -> None:
    pool = model.pool
    pool.drop_arena("layer 0")
    pool.drop_arena("layer 1")
    pool.grow_kv_evenly((2,))
    pool.check_integrity()
    assert pool.stale_bytes == 4 * CHUNK
    assert is_accessible(model.arenas[0].address)
    pool.unmap_stale(3 * CHUNK)
    assert pool.stale_bytes == CHUNK
    pool.unmap_stale(CHUNK)
    assert pool.stale_bytes == 0
    assert not any(is_accessible(model.arenas[layer].address) for layer in (0, 1))


def test_only_chunks_that_held_weights_are_populated(model: Model) -> None:
    """The pages of others may not be there: populating would take memory that nobody needs yet."""
    pool = model.pool
    for arena in model.arenas:
        ctypes.memset(arena.address, 1, ARENA)
    resident = model.memory.resident_bytes
    pool.grow_kv_evenly(range(NUM_LAYERS))
    assert pool.is_tidy
    pool.drop_arena("layer 0")
    pool.grow_kv_evenly((2, 3))
    assert not pool.is_tidy
    while not pool.is_tidy:
        pool.tidy()
    assert model.memory.resident_bytes == resident
    assert pool.stale_bytes == 0


def test_an_arena_that_returns_shows_its_new_chunks(model: Model) -> None:
    """Its addresses still show the old ones, which are KV by now."""
    pool = model.pool
    pool.drop_arena("layer 0")
    blocks = pool.grow_kv_evenly((2,))
    _fill_block(model.regions[2], 0, 5)
    pool.shrink_kv((2,), blocks - 2 * CHUNK // BLOCK - 1)
    pool.restore_arena("layer 0")
    ctypes.memset(model.arenas[0].address, 1, ARENA)
    assert _block(model.regions[2], 0) == bytes([5]) * BLOCK
    pool.check_integrity()


def test_an_arena_that_does_not_fit_leaves_nothing_behind(model: Model) -> None:
    with pytest.raises(OutOfChunksError):
        model.pool.weight_arena("head", 9 * CHUNK)
    model.pool.check_integrity()
    assert model.pool.weight_arena("head", 8 * CHUNK).nbytes == 8 * CHUNK


@pytest.mark.parametrize("name", ["layer 9", ""])
def test_an_unknown_arena_is_an_error(model: Model, name: str) -> None:
    with pytest.raises(ValueError, match="no arena"):
        model.pool.drop_arena(name)


def test_names_and_layers_are_used_once(model: Model) -> None:
    with pytest.raises(ValueError, match="already"):
        model.pool.weight_arena("layer 0", CHUNK)
    with pytest.raises(ValueError, match="already"):
        model.pool.kv_region(0, BLOCK)


class _FailingRange:
    """A range of the real memory whose second `map` the system refuses."""

    def __init__(self, real: VirtualRange) -> None:
        self._real = real
        self._maps_left = 1

    @property
    def address(self) -> int:
        return self._real.address

    @property
    def reserved_bytes(self) -> int:
        return self._real.reserved_bytes

    def map(self, position: int, run: ChunkRun) -> None:
        if self._maps_left == 0:
            raise DeviceMemoryError("cannot map: Cannot allocate memory")
        self._maps_left -= 1
        self._real.map(position, run)

    def unmap(self, position: int, count: int) -> None:
        self._real.unmap(position, count)

    def close(self) -> None:
        self._real.close()


class _FailingMemory(CpuMemory):
    """Real memory, but ranges as long as the budget (those of the KV) fail half-way."""

    def reserve(self, nbytes: int) -> VirtualRange:
        real = super().reserve(nbytes)
        is_kv = real.reserved_bytes == self.num_chunks * self.chunk_bytes
        return _FailingRange(real) if is_kv else real


def test_a_map_refused_half_way_is_undone() -> None:
    pool = MemoryPool(_FailingMemory(6 * CHUNK, CHUNK))
    for name in "abcdef":
        pool.weight_arena(name, CHUNK)
    region = pool.kv_region(0, BLOCK)
    for name in "ace":  # leaves three single free chunks, so three maps
        pool.drop_arena(name)
    with pytest.raises(DeviceMemoryError, match="Cannot allocate"):
        pool.grow_kv_evenly((0,))
    pool.check_integrity()
    assert (pool.num_kv_blocks((0,)), pool.usage.free_bytes) == (0, 3 * CHUNK)
    assert not is_accessible(region.address)
    pool.close()


class PoolMachine(RuleBasedStateMachine):
    """Random drops, restores, growth and shrinking; contents are checked after each."""

    @initialize(num_chunks=st.integers(2 * NUM_LAYERS, 20))
    def start(self, num_chunks: int) -> None:
        self.model = Model(num_chunks)
        self.addresses = [region.address for region in self.model.regions]
        self.dropped: set[int] = set()
        self.num_blocks = dict.fromkeys(range(NUM_LAYERS), 0)
        self.stamp = 0

    @property
    def held(self) -> list[int]:
        return [layer for layer in range(NUM_LAYERS) if layer not in self.dropped]

    @rule(layer=st.integers(0, NUM_LAYERS - 1))
    def drop(self, layer: int) -> None:
        self.model.pool.drop_arena(f"layer {layer}")
        self.model.pool.shrink_kv((layer,), 0)
        self.dropped.add(layer)
        self.num_blocks[layer] = 0

    @rule(layer=st.integers(0, NUM_LAYERS - 1))
    def restore(self, layer: int) -> None:
        fits = self.model.pool.usage.free_bytes >= 2 * CHUNK or layer not in self.dropped
        if not fits:
            with pytest.raises(OutOfChunksError):
                self.model.pool.restore_arena(f"layer {layer}")
            return
        self.model.pool.restore_arena(f"layer {layer}")
        ctypes.memset(self.model.arenas[layer].address, 0xAA, ARENA)
        self.dropped.discard(layer)

    @rule()
    def grow(self) -> None:
        if self.held:
            total = self.model.pool.grow_kv_evenly(self.held)
            assert total >= min(self.num_blocks[layer] for layer in self.held)
            for layer in self.held:
                for block in range(self.num_blocks[layer], total):
                    _fill_block(self.model.regions[layer], block, self._value(layer, block))
                self.num_blocks[layer] = max(total, self.num_blocks[layer])

    @rule(num_blocks=st.integers(0, 12))
    def shrink(self, num_blocks: int) -> None:
        self.model.pool.shrink_kv(self.held, num_blocks)
        for layer in self.held:
            self.num_blocks[layer] = min(self.num_blocks[layer], num_blocks)

    @rule()
    def trim(self) -> None:
        self.model.pool.trim()

    @rule(num_chunks=st.integers(0, 8))
    def unmap_stale(self, num_chunks: int) -> None:
        before = self.model.pool.stale_bytes
        self.model.pool.unmap_stale(num_chunks * CHUNK)
        unmapped = min(max(1, num_chunks) * CHUNK, before)
        assert self.model.pool.stale_bytes == before - unmapped

    @rule()
    def tidy(self) -> None:
        """Everything that was put off is done in so many goes; more are harmless."""
        for _ in range(40):
            self.model.pool.tidy()
        assert self.model.pool.is_tidy

    @rule(layer=st.integers(0, NUM_LAYERS - 1), first=st.integers(0, 20), count=st.integers(1, 20))
    def locate(self, layer: int, first: int, count: int) -> None:
        """The bytes of blocks are in the file where the pool says, in as few runs as there are."""
        end = min(first + count, self.num_blocks[layer])
        if first >= end:
            return
        runs = self.model.pool.locate_kv(layer, first, end)
        found = b"".join(
            os.pread(self.model.memory.shareable_file, nbytes, offset) for offset, nbytes in runs
        )
        region = self.model.regions[layer]
        assert found == b"".join(_block(region, block) for block in range(first, end))
        assert not any(sum(run) == after.offset for run, after in pairwise(runs))

    @staticmethod
    def _value(layer: int, block: int) -> int:
        return (layer * 50 + block) % 256

    @invariant()
    def books_and_contents_are_right(self) -> None:
        pool = self.model.pool
        pool.check_integrity()
        usage = pool.usage
        assert usage.weight_bytes + usage.kv_bytes + usage.free_bytes == pool.budget_bytes
        assert self.model.memory.resident_bytes <= pool.budget_bytes
        assert [region.address for region in self.model.regions] == self.addresses
        if pool.stale_bytes == 0:
            self._check_accessible()
        for layer, num_blocks in self.num_blocks.items():
            for block in range(num_blocks):
                expected = bytes([self._value(layer, block)]) * BLOCK
                assert _block(self.model.regions[layer], block) == expected

    def _check_accessible(self) -> None:
        """Exactly what has owners can be touched."""
        pool = self.model.pool
        for layer, arena in enumerate(self.model.arenas):
            assert is_accessible(arena.address) == (layer not in self.dropped)
        for region in self.model.regions:
            beyond = (pool.num_kv_blocks((region.layer,)) * BLOCK // CHUNK + 1) * CHUNK
            assert beyond >= pool.budget_bytes or not is_accessible(region.address + beyond)

    def teardown(self) -> None:
        self.model.pool.close()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30)
