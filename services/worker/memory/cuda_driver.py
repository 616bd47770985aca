"""The CUDA driver's virtual memory management, through `cuda.bindings`. Implements `VmmDriver`.

Everything happens in the device's primary context, the one that torch uses. A context is current
per thread: in the one that makes a `CudaDriver`, and in any other once it has called `attach`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from services.worker.memory.errors import DeviceMemoryError
from shared.errors import ConfigError


class CudaDriver:
    """The driver's calls on one device."""

    def __init__(self, ordinal: int) -> None:
        """Make the primary context of device `ordinal` current in this thread.

        Raises:
            ConfigError: `cuda.bindings` is not installed, or there is no such device or driver.
        """
        self.bindings = _bindings()
        self.ordinal = ordinal
        try:
            self.call(self.bindings.cuInit, 0)
            device = self.call(self.bindings.cuDeviceGet, ordinal)
            self._context = self.call(self.bindings.cuDevicePrimaryCtxRetain, device)
            self.attach()
            self.is_exportable = self._has_exportable_memory(device)
            self.name = (
                self.call(self.bindings.cuDeviceGetName, 256, device).split(b"\0")[0].decode()
            )
        except (DeviceMemoryError, RuntimeError) as error:  # RuntimeError: there is no driver
            raise ConfigError(f"CUDA device {ordinal} cannot be used: {error}") from error
        self._properties = self._allocation_properties()
        self._access = self._access_descriptor()

    def attach(self) -> None:
        """Let the calling thread use the device, too."""
        self.call(self.bindings.cuCtxSetCurrent, self._context)

    @property
    def granularity_bytes(self) -> int:
        """Chunks must be multiples of this."""
        flags = self.bindings.CUmemAllocationGranularity_flags
        return int(
            self.call(
                self.bindings.cuMemGetAllocationGranularity,
                self._properties,
                flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM,
            )
        )

    def create(self, nbytes: int) -> int:
        """Allocate physical memory; returns its handle."""
        return int(self.call(self.bindings.cuMemCreate, nbytes, self._properties, 0))

    def release(self, handle: int) -> None:
        """Free physical memory, once nothing maps it."""
        self.call(self.bindings.cuMemRelease, handle)

    def reserve(self, nbytes: int) -> int:
        """Reserve addresses; returns the first."""
        try:
            return int(self.call(self.bindings.cuMemAddressReserve, nbytes, 0, 0, 0))
        except DeviceMemoryError as error:
            raise DeviceMemoryError(
                f"cannot reserve {nbytes} bytes of device addresses: {error}"
            ) from error

    def free(self, address: int, nbytes: int) -> None:
        """Give a whole reservation back; nothing may be mapped there."""
        self.call(self.bindings.cuMemAddressFree, address, nbytes)

    def map(self, address: int, nbytes: int, handle: int) -> None:
        """Map a whole handle to reserved addresses; not accessible yet."""
        self.call(self.bindings.cuMemMap, address, nbytes, 0, handle, 0)

    def set_access(self, address: int, nbytes: int) -> None:
        """Let the device read and write mapped addresses."""
        self.call(self.bindings.cuMemSetAccess, address, nbytes, [self._access], 1)

    def unmap(self, address: int, nbytes: int) -> None:
        """Unmap addresses that are mapped without a gap, by whole mappings."""
        self.call(self.bindings.cuMemUnmap, address, nbytes)

    def synchronize(self) -> None:
        """Wait until the device has done all work of this process."""
        self.call(self.bindings.cuCtxSynchronize)

    # --- sharing with another process, and looking at memory -------------------------------------

    def export_handle(self, handle: int) -> int:
        """A file descriptor that stands for `handle` in another process; the caller closes it."""
        return int(
            self.call(self.bindings.cuMemExportToShareableHandle, handle, self._fd_type(), 0)
        )

    def import_handle(self, file: int) -> int:
        """A handle for memory that another process exported; the file may be closed afterwards."""
        return int(self.call(self.bindings.cuMemImportFromShareableHandle, file, self._fd_type()))

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        free_bytes, total_bytes = self.call(self.bindings.cuMemGetInfo)
        return int(free_bytes), int(total_bytes)

    def is_accessible(self, address: int) -> bool:
        """True if the device may touch `address`."""
        try:
            flags = self.call(self.bindings.cuMemGetAccess, self._location(), address)
        except DeviceMemoryError:
            return False
        return int(flags) != 0

    def write(self, address: int, data: bytes) -> None:
        """Copy `data` to the device and wait for it."""
        self.call(self.bindings.cuMemcpyHtoD, address, data, len(data))

    def read(self, address: int, nbytes: int) -> bytes:
        """Copy from the device and wait for it."""
        buffer = bytearray(nbytes)
        self.call(self.bindings.cuMemcpyDtoH, buffer, address, nbytes)
        return bytes(buffer)

    # --- structures ------------------------------------------------------------------------------

    def _has_exportable_memory(self, device: Any) -> bool:
        attribute = self.bindings.CUdevice_attribute
        name = attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
        return bool(self.call(self.bindings.cuDeviceGetAttribute, name, device))

    def _fd_type(self) -> Any:
        types = self.bindings.CUmemAllocationHandleType
        return types.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _location(self) -> Any:
        location = self.bindings.CUmemLocation()
        location.type = self.bindings.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = self.ordinal
        return location

    def _allocation_properties(self) -> Any:
        """Memory of the device; the handle type has to be asked for when it is created."""
        properties = self.bindings.CUmemAllocationProp()
        properties.type = self.bindings.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location = self._location()
        if self.is_exportable:
            properties.requestedHandleTypes = self._fd_type()
        return properties

    def _access_descriptor(self) -> Any:
        access = self.bindings.CUmemAccessDesc()
        access.location = self._location()
        access.flags = self.bindings.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        return access

    def call(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        """Call the driver; returns what it gives back, a list unless that is one thing."""
        code, *results = function(*arguments)
        if code != self.bindings.CUresult.CUDA_SUCCESS:
            raise DeviceMemoryError(f"{function.__name__} failed with {code.name}")
        return results[0] if len(results) == 1 else results


def _bindings() -> Any:
    """The module `cuda.bindings.driver`; untyped."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ConfigError(
            "CUDA needs the package cuda-bindings; install KunServe with the extra 'cuda'"
        ) from error
    return driver
