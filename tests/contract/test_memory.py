"""What every physical memory must do; a new device adds itself to `DEVICES` and runs the suite."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import pytest

from services.worker.memory.base import ChunkRun, PhysicalMemory
from services.worker.memory.cpu import CpuMemory
from services.worker.memory.cuda import CudaMemory
from services.worker.memory.cuda_driver import CudaDriver
from services.worker.memory.errors import DeviceMemoryError, DeviceMemoryTooSmallError
from services.worker.memory.pool import MemoryPool
from shared.errors import ConfigError
from tests.fake_cuda import FakeCudaDriver
from tests.memory_access import is_accessible

CHUNK = 64 * 1024
NUM_CHUNKS = 8


class Device(Protocol):
    """How the suite makes a budget of a device and looks at its memory."""

    @property
    def chunk_bytes(self) -> int: ...

    def make(self, num_chunks: int) -> PhysicalMemory: ...

    def write(self, address: int, data: bytes) -> None: ...

    def read(self, address: int, nbytes: int) -> bytes: ...

    def is_accessible(self, address: int) -> bool: ...


@dataclass(frozen=True)
class CpuDevice:
    """The process's own memory."""

    chunk_bytes: int = CHUNK

    def make(self, num_chunks: int) -> PhysicalMemory:
        return CpuMemory(num_chunks * CHUNK, CHUNK)

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def read(self, address: int, nbytes: int) -> bytes:
        return ctypes.string_at(address, nbytes)

    def is_accessible(self, address: int) -> bool:
        return is_accessible(address)


class FakeCudaDevice(CpuDevice):
    """What a CUDA worker uses, on a driver that keeps everything in the process's own memory."""

    def make(self, num_chunks: int) -> PhysicalMemory:
        return CudaMemory(FakeCudaDriver(CHUNK), num_chunks * CHUNK, CHUNK)


class CudaDevice:
    """A real device's memory."""

    @property
    def chunk_bytes(self) -> int:
        return self._driver.granularity_bytes

    def make(self, num_chunks: int) -> PhysicalMemory:
        return CudaMemory(self._driver, num_chunks * self.chunk_bytes, self.chunk_bytes)

    def write(self, address: int, data: bytes) -> None:
        self._driver.write(address, data)

    def read(self, address: int, nbytes: int) -> bytes:
        return self._driver.read(address, nbytes)

    def is_accessible(self, address: int) -> bool:
        return self._driver.is_accessible(address)

    @cached_property
    def _driver(self) -> CudaDriver:
        return CudaDriver(0)


DEVICES = (CpuDevice(), FakeCudaDevice(), pytest.param(CudaDevice(), marks=pytest.mark.gpu))


@pytest.fixture(params=DEVICES, ids=lambda device: type(device).__name__)
def device(request: pytest.FixtureRequest) -> Device:
    chosen: Device = request.param
    return chosen


@pytest.fixture
def memory(device: Device) -> Iterator[PhysicalMemory]:
    budget = device.make(NUM_CHUNKS)
    yield budget
    budget.close()


def test_the_budget_is_what_was_asked_for(device: Device, memory: PhysicalMemory) -> None:
    assert (memory.chunk_bytes, memory.num_chunks) == (device.chunk_bytes, NUM_CHUNKS)


def test_a_reservation_is_rounded_up_and_not_accessible(
    device: Device, memory: PhysicalMemory
) -> None:
    chunk = memory.chunk_bytes
    reserved = memory.reserve(chunk + 1)
    assert reserved.reserved_bytes == 2 * chunk
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
    chunk = memory.chunk_bytes
    reserved = memory.reserve(4 * chunk)
    reserved.map(1, ChunkRun(0, 2))
    inside = [device.is_accessible(reserved.address + i * chunk) for i in range(4)]
    assert inside == [False, True, True, False]
    reserved.unmap(1, 1)
    inside = [device.is_accessible(reserved.address + i * chunk) for i in range(4)]
    assert inside == [False, False, True, False]
    reserved.close()


def test_chunks_keep_their_bytes_when_they_move(device: Device, memory: PhysicalMemory) -> None:
    chunk = memory.chunk_bytes
    weights, kv = memory.reserve(2 * chunk), memory.reserve(4 * chunk)
    weights.map(0, ChunkRun(2, 2))
    device.write(weights.address, b"a" * chunk + b"b" * chunk)
    weights.unmap(0, 2)
    kv.map(1, ChunkRun(3, 1))
    kv.map(2, ChunkRun(2, 1))
    assert device.read(kv.address + chunk, 2 * chunk) == b"b" * chunk + b"a" * chunk
    kv.close()
    weights.close()


def test_a_chunk_may_be_mapped_at_two_places(device: Device, memory: PhysicalMemory) -> None:
    chunk = memory.chunk_bytes
    weights, kv = memory.reserve(chunk), memory.reserve(chunk)
    weights.map(0, ChunkRun(1, 1))
    kv.map(0, ChunkRun(1, 1))
    device.write(weights.address, b"s" * chunk)
    weights.unmap(0, 1)
    assert device.read(kv.address, chunk) == b"s" * chunk
    kv.close()
    weights.close()


def test_a_range_grows_without_touching_what_is_there(
    device: Device, memory: PhysicalMemory
) -> None:
    chunk = memory.chunk_bytes
    reserved = memory.reserve(NUM_CHUNKS * chunk)
    address = reserved.address
    reserved.map(0, ChunkRun(6, 2))
    device.write(address, b"x" * 2 * chunk)
    reserved.map(2, ChunkRun(0, 6))
    device.write(address + 2 * chunk, b"y" * 6 * chunk)
    assert reserved.address == address
    assert device.read(address, NUM_CHUNKS * chunk) == b"x" * 2 * chunk + b"y" * 6 * chunk
    reserved.close()


def test_populating_changes_no_byte(device: Device, memory: PhysicalMemory) -> None:
    chunk = memory.chunk_bytes
    reserved = memory.reserve(4 * chunk)
    reserved.map(0, ChunkRun(2, 3))
    device.write(reserved.address + chunk, b"kept")
    reserved.populate(0, 3)
    assert device.read(reserved.address + chunk, 4) == b"kept"
    with pytest.raises(ValueError, match="range of 4"):
        reserved.populate(2, 3)
    reserved.close()


def test_the_shareable_file_is_the_budget_chunk_after_chunk(
    device: Device, memory: PhysicalMemory
) -> None:
    file = memory.shareable_file
    if file is None:
        pytest.skip("this memory is no file")
    chunk = memory.chunk_bytes
    reserved = memory.reserve(chunk)
    reserved.map(0, ChunkRun(5, 1))
    device.write(reserved.address, b"here")
    assert os.pread(file, 4, 5 * chunk) == b"here"
    assert os.fstat(file).st_size == NUM_CHUNKS * chunk
    for size in (0, 2 * NUM_CHUNKS * chunk):
        with pytest.raises(PermissionError):
            os.truncate(file, size)
    reserved.close()


def test_unmapping_what_is_not_mapped_is_harmless(device: Device, memory: PhysicalMemory) -> None:
    chunk = memory.chunk_bytes
    reserved = memory.reserve(2 * chunk)
    reserved.unmap(0, 2)
    reserved.map(0, ChunkRun(0, 1))
    reserved.unmap(0, 2)
    assert not device.is_accessible(reserved.address)
    reserved.close()


def test_discarded_chunks_can_be_used_again(device: Device, memory: PhysicalMemory) -> None:
    chunk = memory.chunk_bytes
    reserved = memory.reserve(chunk)
    reserved.map(0, ChunkRun(5, 1))
    device.write(reserved.address, b"z" * chunk)
    reserved.unmap(0, 1)
    memory.discard(ChunkRun(5, 1))
    reserved.map(0, ChunkRun(5, 1))
    device.write(reserved.address, b"w" * chunk)
    assert device.read(reserved.address, chunk) == b"w" * chunk
    reserved.close()


@pytest.mark.parametrize(("position", "count"), [(-1, 1), (0, 3), (2, 1), (0, 0)])
def test_mapping_outside_the_range_is_refused(
    memory: PhysicalMemory, position: int, count: int
) -> None:
    chunk = memory.chunk_bytes
    reserved = memory.reserve(2 * chunk)
    with pytest.raises(ValueError, match="not within a range"):
        reserved.map(position, ChunkRun(0, count))
    with pytest.raises(ValueError, match="not within a range"):
        reserved.unmap(position, count)
    reserved.close()


def test_a_closed_range_is_not_mapped_again(memory: PhysicalMemory) -> None:
    chunk = memory.chunk_bytes
    reserved = memory.reserve(chunk)
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

    def test_populated_chunks_take_memory_at_once(self) -> None:
        memory = CpuMemory(NUM_CHUNKS * CHUNK, CHUNK)
        reserved = memory.reserve(NUM_CHUNKS * CHUNK)
        reserved.map(0, ChunkRun(0, NUM_CHUNKS))
        reserved.populate(1, 3)
        assert memory.resident_bytes == 3 * CHUNK
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


class TestCuda:
    """What only the budget of a CUDA device promises; on the fake driver."""

    def test_a_run_of_chunks_becomes_accessible_and_goes_in_one_call(self) -> None:
        driver = FakeCudaDriver(CHUNK)
        memory = CudaMemory(driver, NUM_CHUNKS * CHUNK, CHUNK)
        reserved = memory.reserve(NUM_CHUNKS * CHUNK)
        reserved.map(0, ChunkRun(0, NUM_CHUNKS))
        reserved.unmap(0, NUM_CHUNKS)
        assert (driver.calls["map"], driver.calls["set_access"]) == (NUM_CHUNKS, 1)
        assert driver.calls["unmap"] == 1
        reserved.close()
        memory.close()

    def test_nothing_is_unmapped_before_the_device_is_done(self) -> None:
        driver = FakeCudaDriver(CHUNK)
        memory = CudaMemory(driver, CHUNK, CHUNK)
        reserved = memory.reserve(CHUNK)
        reserved.map(0, ChunkRun(0, 1))
        driver.fail("synchronize")
        with pytest.raises(DeviceMemoryError):
            reserved.unmap(0, 1)
        assert len(driver.mappings) == 1
        reserved.close()
        memory.close()

    @pytest.mark.parametrize(("name", "after"), [("map", 0), ("map", 2), ("set_access", 0)])
    def test_a_refused_mapping_leaves_nothing_mapped(self, name: str, after: int) -> None:
        driver = FakeCudaDriver(CHUNK)
        memory = CudaMemory(driver, NUM_CHUNKS * CHUNK, CHUNK)
        reserved = memory.reserve(NUM_CHUNKS * CHUNK)
        driver.fail(name, after)
        with pytest.raises(DeviceMemoryError):
            reserved.map(1, ChunkRun(0, 4))
        assert driver.mappings == {}
        reserved.map(1, ChunkRun(0, 4))
        reserved.close()
        memory.close()

    def test_a_device_with_too_little_memory_is_a_typed_error_and_keeps_none(self) -> None:
        driver = FakeCudaDriver(CHUNK)
        driver.fail("create", after=3)
        with pytest.raises(DeviceMemoryError, match=f"has {3 * CHUNK} bytes of memory left"):
            CudaMemory(driver, NUM_CHUNKS * CHUNK, CHUNK)
        assert driver.handles == {}

    def test_a_chunk_that_is_not_made_of_the_device_s_pages_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="no multiple"):
            CudaMemory(FakeCudaDriver(CHUNK), 1 << 20, CHUNK + 4096)

    def test_a_budget_below_one_chunk_is_refused(self) -> None:
        with pytest.raises(DeviceMemoryTooSmallError, match="less than a chunk"):
            CudaMemory(FakeCudaDriver(CHUNK), CHUNK - 1, CHUNK)

    def test_closing_gives_everything_back(self) -> None:
        driver = FakeCudaDriver(CHUNK)
        memory = CudaMemory(driver, NUM_CHUNKS * CHUNK, CHUNK)
        reserved = memory.reserve(NUM_CHUNKS * CHUNK)
        reserved.map(2, ChunkRun(3, 2))
        reserved.close()
        memory.close()
        memory.close()
        assert (driver.handles, driver.reservations, driver.mappings) == ({}, {}, {})

    @pytest.mark.parametrize("name", ["map", "set_access"])
    def test_a_drop_that_the_driver_refuses_changes_nothing(self, name: str) -> None:
        driver = FakeCudaDriver(CHUNK)
        pool = MemoryPool(CudaMemory(driver, NUM_CHUNKS * CHUNK, CHUNK))
        pool.weight_arena("layer.0", 2 * CHUNK)
        pool.kv_region(1, CHUNK // 4)
        pool.grow_kv_evenly([1])
        blocks, mappings = pool.num_kv_blocks([1]), dict(driver.mappings)
        pool.drop_arena("layer.0")
        driver.fail(name)
        with pytest.raises(DeviceMemoryError):
            pool.grow_kv_evenly([1])
        pool.restore_arena("layer.0")
        assert (pool.num_kv_blocks([1]), driver.mappings) == (blocks, mappings)
        pool.check_integrity()
        pool.close()
