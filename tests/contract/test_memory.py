"""What every physical memory must do; a new device adds itself to `DEVICES` and runs the suite."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import pytest

from services.worker.memory.base import ChunkRun, PhysicalMemory
from services.worker.memory.cpu import CpuMemory
from services.worker.memory.errors import DeviceMemoryError, DeviceMemoryTooSmallError
from shared.errors import ConfigError
from tests.memory_access import is_accessible

CHUNK = 64 * 1024
NUM_CHUNKS = 8


class Device(Protocol):
    """How the suite makes a budget of a device and looks at its memory."""

    def make(self, num_chunks: int) -> PhysicalMemory: ...

    def write(self, address: int, data: bytes) -> None: ...

    def read(self, address: int, nbytes: int) -> bytes: ...

    def is_accessible(self, address: int) -> bool: ...


@dataclass(frozen=True)
class CpuDevice:
    """The process's own memory."""

    def make(self, num_chunks: int) -> PhysicalMemory:
        return CpuMemory(num_chunks * CHUNK, CHUNK)

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def read(self, address: int, nbytes: int) -> bytes:
        return ctypes.string_at(address, nbytes)

    def is_accessible(self, address: int) -> bool:
        return is_accessible(address)


DEVICES: tuple[Device, ...] = (CpuDevice(),)


@pytest.fixture(params=DEVICES, ids=lambda device: type(device).__name__)
def device(request: pytest.FixtureRequest) -> Device:
    chosen: Device = request.param
    return chosen


@pytest.fixture
def memory(device: Device) -> Iterator[PhysicalMemory]:
    budget = device.make(NUM_CHUNKS)
    yield budget
    budget.close()


def test_the_budget_is_what_was_asked_for(memory: PhysicalMemory) -> None:
    assert (memory.chunk_bytes, memory.num_chunks) == (CHUNK, NUM_CHUNKS)


def test_a_reservation_is_rounded_up_and_not_accessible(
    device: Device, memory: PhysicalMemory
) -> None:
    reserved = memory.reserve(CHUNK + 1)
    assert reserved.reserved_bytes == 2 * CHUNK
    assert not device.is_accessible(reserved.address)
    reserved.close()


def test_ranges_far_larger_than_the_budget_can_be_reserved(memory: PhysicalMemory) -> None:
    ranges = [memory.reserve(1 << 36) for _ in range(64)]
    addresses = sorted(reserved.address for reserved in ranges)
    gaps = [later - earlier for earlier, later in itertools.pairwise(addresses)]
    assert min(gaps) >= 1 << 36
    for reserved in ranges:
        reserved.close()


def test_exactly_the_mapped_part_is_accessible(device: Device, memory: PhysicalMemory) -> None:
    reserved = memory.reserve(4 * CHUNK)
    reserved.map(1, ChunkRun(0, 2))
    inside = [device.is_accessible(reserved.address + i * CHUNK) for i in range(4)]
    assert inside == [False, True, True, False]
    reserved.unmap(1, 1)
    inside = [device.is_accessible(reserved.address + i * CHUNK) for i in range(4)]
    assert inside == [False, False, True, False]
    reserved.close()


def test_chunks_keep_their_bytes_when_they_move(device: Device, memory: PhysicalMemory) -> None:
    weights, kv = memory.reserve(2 * CHUNK), memory.reserve(4 * CHUNK)
    weights.map(0, ChunkRun(2, 2))
    device.write(weights.address, b"a" * CHUNK + b"b" * CHUNK)
    weights.unmap(0, 2)
    kv.map(1, ChunkRun(3, 1))
    kv.map(2, ChunkRun(2, 1))
    assert device.read(kv.address + CHUNK, 2 * CHUNK) == b"b" * CHUNK + b"a" * CHUNK
    kv.close()
    weights.close()


def test_a_range_grows_without_touching_what_is_there(
    device: Device, memory: PhysicalMemory
) -> None:
    reserved = memory.reserve(NUM_CHUNKS * CHUNK)
    address = reserved.address
    reserved.map(0, ChunkRun(6, 2))
    device.write(address, b"x" * 2 * CHUNK)
    reserved.map(2, ChunkRun(0, 6))
    device.write(address + 2 * CHUNK, b"y" * 6 * CHUNK)
    assert reserved.address == address
    assert device.read(address, NUM_CHUNKS * CHUNK) == b"x" * 2 * CHUNK + b"y" * 6 * CHUNK
    reserved.close()


def test_unmapping_what_is_not_mapped_is_harmless(device: Device, memory: PhysicalMemory) -> None:
    reserved = memory.reserve(2 * CHUNK)
    reserved.unmap(0, 2)
    reserved.map(0, ChunkRun(0, 1))
    reserved.unmap(0, 2)
    assert not device.is_accessible(reserved.address)
    reserved.close()


def test_discarded_chunks_can_be_used_again(device: Device, memory: PhysicalMemory) -> None:
    reserved = memory.reserve(CHUNK)
    reserved.map(0, ChunkRun(5, 1))
    device.write(reserved.address, b"z" * CHUNK)
    reserved.unmap(0, 1)
    memory.discard(ChunkRun(5, 1))
    reserved.map(0, ChunkRun(5, 1))
    device.write(reserved.address, b"w" * CHUNK)
    assert device.read(reserved.address, CHUNK) == b"w" * CHUNK
    reserved.close()


@pytest.mark.parametrize(("position", "count"), [(-1, 1), (0, 3), (2, 1), (0, 0)])
def test_mapping_outside_the_range_is_refused(
    memory: PhysicalMemory, position: int, count: int
) -> None:
    reserved = memory.reserve(2 * CHUNK)
    with pytest.raises(ValueError, match="not within a range"):
        reserved.map(position, ChunkRun(0, count))
    with pytest.raises(ValueError, match="not within a range"):
        reserved.unmap(position, count)
    reserved.close()


def test_a_closed_range_is_not_mapped_again(memory: PhysicalMemory) -> None:
    reserved = memory.reserve(CHUNK)
    reserved.close()
    reserved.close()
    with pytest.raises(ValueError, match="closed"):
        reserved.map(0, ChunkRun(0, 1))


def test_an_impossible_reservation_is_a_typed_error(memory: PhysicalMemory) -> None:
    with pytest.raises(DeviceMemoryError, match="cannot reserve"):
        memory.reserve(1 << 60)


class TestCpu:
    """What only the CPU's budget promises."""

    def test_memory_is_taken_at_first_touch_and_given_back_by_discard(self) -> None:
        memory = CpuMemory(NUM_CHUNKS * CHUNK, CHUNK)
        reserved = memory.reserve(NUM_CHUNKS * CHUNK)
        reserved.map(0, ChunkRun(0, NUM_CHUNKS))
        assert memory.resident_bytes == 0
        ctypes.memset(reserved.address, 1, 3 * CHUNK)
        assert memory.resident_bytes == 3 * CHUNK
        reserved.unmap(0, NUM_CHUNKS)
        assert memory.resident_bytes == 3 * CHUNK
        memory.discard(ChunkRun(0, 2))
        assert memory.resident_bytes == CHUNK
        reserved.close()
        memory.close()

    def test_a_chunk_that_is_not_made_of_pages_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="no multiple"):
            CpuMemory(1 << 20, 5000)

    def test_a_budget_below_one_chunk_is_refused(self) -> None:
        with pytest.raises(DeviceMemoryTooSmallError, match="less than a chunk"):
            CpuMemory(CHUNK - 1, CHUNK)

    def test_what_is_not_a_whole_chunk_is_left_out(self) -> None:
        memory = CpuMemory(3 * CHUNK - 1, CHUNK)
        assert memory.num_chunks == 2
        memory.close()

    def test_nothing_stays_open(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        memory = CpuMemory(NUM_CHUNKS * CHUNK, CHUNK)
        memory.reserve(CHUNK).close()
        memory.close()
        memory.close()
        assert len(os.listdir("/proc/self/fd")) == before
