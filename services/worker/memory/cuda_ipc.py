"""CUDA's older way to share memory and events between processes of one machine.

It works for memory of `cuMemAlloc` only, not for the chunks of a `CudaMemory`: those are exported
as file descriptors. A handle is 64 bytes that mean something in other processes of this machine.
"""

from __future__ import annotations

import ctypes
from typing import Any

from services.worker.memory.cuda_driver import CudaDriver

_HANDLE_BYTES = 64


class CudaIpc:
    """Exports and imports with the context of a `CudaDriver`; same thread."""

    def __init__(self, driver: CudaDriver) -> None:
        self._call = driver.call
        self._driver = driver.bindings

    def allocate(self, nbytes: int) -> int:
        """Address of memory of its own that can be exported."""
        return int(self._call(self._driver.cuMemAlloc, nbytes))

    def free(self, address: int) -> None:
        """Free what `allocate` gave; no other process may have it open."""
        self._call(self._driver.cuMemFree, address)

    def export_memory(self, address: int) -> bytes:
        """The handle of an allocation."""
        return _to_bytes(self._call(self._driver.cuIpcGetMemHandle, address))

    def open_memory(self, handle: bytes) -> int:
        """Map another process's allocation; returns its address here."""
        flag = self._driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        opened = _from_bytes(self._driver.CUipcMemHandle(), handle)
        return int(self._call(self._driver.cuIpcOpenMemHandle, opened, flag.value))

    def close_memory(self, address: int) -> None:
        """Unmap what `open_memory` mapped, before its owner frees it."""
        self._call(self._driver.cuIpcCloseMemHandle, address)

    def record_event(self) -> tuple[Any, bytes]:
        """A recorded event, to be kept, and its handle."""
        flags = self._driver.CUevent_flags
        chosen = flags.CU_EVENT_INTERPROCESS.value | flags.CU_EVENT_DISABLE_TIMING.value
        event = self._call(self._driver.cuEventCreate, chosen)
        self._call(self._driver.cuEventRecord, event, 0)
        return event, _to_bytes(self._call(self._driver.cuIpcGetEventHandle, event))

    def wait_event(self, handle: bytes) -> None:
        """Wait until another process's event has happened."""
        opened = _from_bytes(self._driver.CUipcEventHandle(), handle)
        event = self._call(self._driver.cuIpcOpenEventHandle, opened)
        self._call(self._driver.cuEventSynchronize, event)
        self._call(self._driver.cuEventDestroy, event)


def _to_bytes(handle: Any) -> bytes:
    return ctypes.string_at(handle.getPtr(), _HANDLE_BYTES)


def _from_bytes(handle: Any, data: bytes) -> Any:
    ctypes.memmove(handle.getPtr(), data, _HANDLE_BYTES)
    return handle
