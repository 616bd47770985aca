"""Physical memory of a CUDA worker: chunks of device memory, mapped with the driver's VMM calls.

    cuMemCreate         handle 0 | handle 1 | handle 2 | ...     one per chunk, all at start
    cuMemAddressReserve range A [ chunk 0 | chunk 2 | reserved )
    cuMemMap            one call per chunk
    cuMemSetAccess      one call per run of neighbouring addresses
    cuMemUnmap          one call per run; the handles, and so the bytes, stay

All chunks are created at start, so that growing later cannot fail because somebody else took the
memory. They lie outside torch's allocator, which knows nothing of them; what torch needs for itself
must be allocated before. Chunks can be exported to other processes as file descriptors where the
device can do that at all.

`VmmDriver` is the seam to the driver: `cuda_driver.py` is the real one, `tests/fake_cuda.py` has
the same rules and runs the same contract tests without a device. On a real one nothing of this has
run yet. The engine thread calls it.
"""

from __future__ import annotations

from typing import Protocol

from services.worker.memory.base import ChunkRun, VirtualRange
from services.worker.memory.errors import DeviceMemoryError, DeviceMemoryTooSmallError
from services.worker.memory.reserved import ReservedRange
from services.worker.memory.runs import coalesce
from shared.errors import ConfigError


class VmmDriver(Protocol):
    """The calls of the CUDA driver that are needed; every refusal is a DeviceMemoryError."""

    @property
    def granularity_bytes(self) -> int:
        """Chunks must be multiples of this."""
        ...

    def create(self, nbytes: int) -> int:
        """Allocate physical memory; returns its handle."""
        ...

    def release(self, handle: int) -> None:
        """Free physical memory, once nothing maps it."""
        ...

    def reserve(self, nbytes: int) -> int:
        """Reserve addresses; returns the first."""
        ...

    def free(self, address: int, nbytes: int) -> None:
        """Give a whole reservation back; nothing may be mapped there."""
        ...

    def map(self, address: int, nbytes: int, handle: int) -> None:
        """Map a whole handle to reserved addresses; not accessible yet."""
        ...

    def set_access(self, address: int, nbytes: int) -> None:
        """Let the device read and write mapped addresses."""
        ...

    def unmap(self, address: int, nbytes: int) -> None:
        """Unmap addresses that are mapped without a gap, by whole mappings."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done all work of this process."""
        ...


class CudaMemory:
    """A budget of `num_chunks` chunks of device memory."""

    def __init__(self, driver: VmmDriver, budget_bytes: int, chunk_bytes: int) -> None:
        """Allocate the budget, rounded down to whole chunks.

        Raises:
            ConfigError: the device has no chunks of that size, or the budget is below one.
            DeviceMemoryError: the device has less memory left; nothing is allocated then.
        """
        granularity = driver.granularity_bytes
        if chunk_bytes < granularity or chunk_bytes % granularity:
            raise ConfigError(
                f"a chunk of {chunk_bytes} bytes is no multiple of the device's {granularity} bytes"
            )
        if budget_bytes < chunk_bytes:
            raise DeviceMemoryTooSmallError(
                f"device memory of {budget_bytes} bytes is less than a chunk of {chunk_bytes}"
            )
        self._driver = driver
        self._chunk_bytes = chunk_bytes
        self._handles: list[int] = []
        self._num_chunks = budget_bytes // chunk_bytes
        try:
            for _ in range(self._num_chunks):
                self._handles.append(driver.create(chunk_bytes))
        except DeviceMemoryError as error:
            num_created = len(self._handles)
            self.close()
            raise DeviceMemoryError(
                f"the device has {num_created * chunk_bytes} bytes of memory left, not the"
                f" {budget_bytes} asked for: {error}"
            ) from error

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk."""
        return self._chunk_bytes

    @property
    def num_chunks(self) -> int:
        """Chunks of the budget."""
        return self._num_chunks

    @property
    def shareable_file(self) -> None:
        """There is none: each chunk would be a file of its own."""

    def reserve(self, nbytes: int) -> VirtualRange:
        """Reserve addresses for at least `nbytes`."""
        return CudaRange(self._driver, self._handles, self._chunk_bytes, nbytes)

    def discard(self, run: ChunkRun) -> None:
        """Nothing: the device memory of a budget is the worker's own as long as it lives."""

    def close(self) -> None:
        """Free the budget; every range must be closed before."""
        while self._handles:
            self._driver.release(self._handles.pop())


class CudaRange(ReservedRange):
    """A reserved range of device addresses; made by `CudaMemory.reserve`."""

    def __init__(
        self, driver: VmmDriver, handles: list[int], chunk_bytes: int, nbytes: int
    ) -> None:
        super().__init__(nbytes, chunk_bytes, driver.reserve)
        self._driver = driver
        self._handles = handles
        self._is_closed = False
        self._mapped: set[int] = set()  # positions; the driver refuses to unmap what is not

    def map(self, position: int, run: ChunkRun) -> None:
        """Map `run` from the `position`-th chunk of the range on."""
        address, nbytes = self._part(position, run.count)
        end = address
        try:
            for handle in self._handles[run.first : run.first + run.count]:
                self._driver.map(end, self._chunk_bytes, handle)
                end += self._chunk_bytes
            self._driver.set_access(address, nbytes)
        except DeviceMemoryError:
            if end > address:
                self._driver.unmap(address, end - address)
            raise
        self._mapped.update(range(position, position + run.count))

    def unmap(self, position: int, count: int) -> None:
        """Unmap what is mapped of `count` chunks from `position` on, once no kernel uses it."""
        self._part(position, count)
        mapped = sorted(p for p in self._mapped if position <= p < position + count)
        if mapped:
            self._driver.synchronize()
        for run in coalesce(mapped):
            self._driver.unmap(*self._part(run.first, run.count))
            self._mapped.difference_update(range(run.first, run.first + run.count))

    def populate(self, position: int, count: int) -> None:
        """Nothing but a check: a device has no faults to spare."""
        self._part(position, count)

    def close(self) -> None:
        """Give the addresses back."""
        if not self._is_closed:
            self.unmap(0, self._num_chunks)
            self._driver.free(self.address, self.reserved_bytes)
            self._is_closed = True

    def _part(self, position: int, count: int) -> tuple[int, int]:
        if self._is_closed:
            raise ValueError("the range is closed")
        return super()._part(position, count)
