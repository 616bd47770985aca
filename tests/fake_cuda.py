"""The CUDA driver's virtual memory management over host memory: same rules, no device.

A handle is a memfd, a reservation an mmap of nothing. Mapping gives no access (PROT_NONE) until
`set_access`, and what the driver refuses is refused here: mapping over a mapping, unmapping a part
of a mapping or what is not mapped, freeing addresses that are mapped, releasing twice. So code that
runs on this runs on the driver, as far as the order of its calls goes.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from services.worker.memory.errors import DeviceMemoryError
from tests.refusals import RefusableCalls

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_NOTHING = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class FakeCudaDriver(RefusableCalls):
    """Implements `VmmDriver`."""

    def __init__(self, granularity_bytes: int) -> None:
        super().__init__()
        self._granularity_bytes = granularity_bytes
        self.handles: dict[int, int] = {}  # size by handle, which is a file descriptor
        self.reservations: dict[int, int] = {}  # size by address
        self.mappings: dict[int, int] = {}  # size by address

    @property
    def granularity_bytes(self) -> int:
        return self._granularity_bytes

    def create(self, nbytes: int) -> int:
        self._enter("create", nbytes)
        handle = os.memfd_create("fake-cuda", os.MFD_CLOEXEC)
        os.truncate(handle, nbytes)
        self.handles[handle] = nbytes
        return handle

    def release(self, handle: int) -> None:
        self._enter("release")
        if handle not in self.handles:
            raise DeviceMemoryError("release: no such handle")
        del self.handles[handle]
        os.close(handle)

    def reserve(self, nbytes: int) -> int:
        self._enter("reserve", nbytes)
        address = _LIBC.mmap(None, nbytes, _PROT_NONE, _NOTHING, -1, 0)
        if address == ctypes.c_void_p(-1).value:
            raise DeviceMemoryError(f"cannot reserve {nbytes} bytes of device addresses")
        self.reservations[address] = nbytes
        return int(address)

    def free(self, address: int, nbytes: int) -> None:
        self._enter("free", nbytes)
        if self.reservations.get(address) != nbytes or self._mapped_in(address, nbytes):
            raise DeviceMemoryError("free: not a whole reservation, or something is mapped")
        del self.reservations[address]
        _LIBC.munmap(address, nbytes)

    def map(self, address: int, nbytes: int, handle: int) -> None:
        self._enter("map", nbytes)
        is_reserved = any(
            start <= address and address + nbytes <= start + size
            for start, size in self.reservations.items()
        )
        if not is_reserved or self.handles.get(handle) != nbytes:
            raise DeviceMemoryError("map: not reserved, or not a whole handle")
        if self._mapped_in(address, nbytes):
            raise DeviceMemoryError("map: something is mapped there")
        self.mappings[address] = nbytes
        _mmap_over(address, nbytes, mmap.MAP_SHARED, handle)

    def set_access(self, address: int, nbytes: int) -> None:
        self._enter("set_access", nbytes)
        self._whole_mappings("set_access", address, nbytes)
        if _LIBC.mprotect(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE) != 0:
            raise DeviceMemoryError(f"set_access: {errno.errorcode[ctypes.get_errno()]}")

    def unmap(self, address: int, nbytes: int) -> None:
        self._enter("unmap", nbytes)
        for start in self._whole_mappings("unmap", address, nbytes):
            del self.mappings[start]
        _mmap_over(address, nbytes, _NOTHING, -1)

    def synchronize(self) -> None:
        self._enter("synchronize")

    def _enter(self, name: str, nbytes: int | None = None) -> None:
        """Count a call, refuse it if that was asked for, and check its size."""
        self.note(name)
        if nbytes is not None and (nbytes <= 0 or nbytes % self._granularity_bytes):
            raise DeviceMemoryError(f"{name}: {nbytes} bytes are not whole pages")

    def _mapped_in(self, address: int, nbytes: int) -> list[int]:
        """Mappings that touch a part of the addresses."""
        return [
            start
            for start, size in self.mappings.items()
            if start < address + nbytes and address < start + size
        ]

    def _whole_mappings(self, name: str, address: int, nbytes: int) -> list[int]:
        """The mappings that make up exactly this part."""
        starts = self._mapped_in(address, nbytes)
        is_inside = all(
            address <= start and start + self.mappings[start] <= address + nbytes
            for start in starts
        )
        if not is_inside or sum(self.mappings[start] for start in starts) != nbytes:
            raise DeviceMemoryError(f"{name}: not made of whole mappings")
        return starts


def _mmap_over(address: int, nbytes: int, flags: int, file: int) -> None:
    result = _LIBC.mmap(address, nbytes, _PROT_NONE, flags | _MAP_FIXED, file, 0)
    if result != address:
        raise DeviceMemoryError(f"mmap: {errno.errorcode[ctypes.get_errno()]}")
