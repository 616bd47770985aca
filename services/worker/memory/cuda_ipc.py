"""Memory that processes of one machine share with a CUDA device, and words their streams wait for.

    device memory   cuMemAlloc here, opened there: 64 bytes that mean something on this machine
    host memory     mapped by both processes, and registered by both with the device: a stream of
                    the one writes a word, a stream of the other waits for it

Sharing works for memory of `cuMemAlloc` only, not for the chunks of a `CudaMemory`: those are
exported as file descriptors.

Words rather than CUDA's own interprocess events, because a process may be killed. Its streams die
with it, and an event that they were about to record never happens: whoever has a stream wait for it
waits for ever, and cannot even destroy the stream. A word in host memory can be written by anybody.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from services.worker.memory.cuda_driver import CudaDriver

_HANDLE_BYTES = 64
_BLOCK_BYTES = 2 * 1024 * 1024


def _default_stream() -> int:
    return 0


class CudaIpc:
    """Exports, imports and stream operations in the context of a `CudaDriver`. Any thread.

    Args:
        current_stream: the stream of the calling thread that words are written and waited on.
    """

    def __init__(
        self, driver: CudaDriver, current_stream: Callable[[], int] = _default_stream
    ) -> None:
        self._call = driver.call
        self._driver = driver.bindings
        self._current_stream = current_stream
        self.attach = driver.attach
        self.synchronize = driver.synchronize
        self.write = driver.write
        self.read = driver.read

    # --- device memory ---------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> int:
        """Address of memory of its own that can be exported.

        In whole blocks of the driver's: of a smaller allocation it would share the block.
        """
        whole = -(-nbytes // _BLOCK_BYTES) * _BLOCK_BYTES
        return int(self._call(self._driver.cuMemAlloc, whole))

    def free(self, address: int) -> None:
        """Free what `allocate` gave; no other process may have it open."""
        self._call(self._driver.cuMemFree, address)

    def export_memory(self, address: int) -> bytes:
        """The handle of an allocation."""
        handle = self._call(self._driver.cuIpcGetMemHandle, address)
        return ctypes.string_at(handle.getPtr(), _HANDLE_BYTES)

    def open_memory(self, handle: bytes) -> int:
        """Map another process's allocation; returns its address here."""
        flag = self._driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        opened: Any = self._driver.CUipcMemHandle()
        ctypes.memmove(opened.getPtr(), handle, _HANDLE_BYTES)
        return int(self._call(self._driver.cuIpcOpenMemHandle, opened, flag.value))

    def close_memory(self, address: int) -> None:
        """Unmap what `open_memory` mapped, before its owner frees it."""
        self._call(self._driver.cuIpcCloseMemHandle, address)

    # --- words in host memory --------------------------------------------------------------------

    def register(self, address: int, nbytes: int) -> int:
        """Let the device touch whole pages of host memory; returns their address there."""
        flag = self._driver.CU_MEMHOSTREGISTER_DEVICEMAP
        self._call(self._driver.cuMemHostRegister, address, nbytes, flag)
        return int(self._call(self._driver.cuMemHostGetDevicePointer, address, 0))

    def unregister(self, address: int) -> None:
        """Take the device's right to registered pages away, once no stream uses them."""
        self._call(self._driver.cuMemHostUnregister, address)

    def write_value(self, address: int, value: int) -> None:
        """Have the current stream write a word, behind all that it has written before."""
        flag = self._driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
        stream = self._current_stream()
        self._call(self._driver.cuStreamWriteValue32, stream, address, value, flag.value)

    def wait_value(self, address: int, value: int) -> None:
        """Have the current stream wait until a word is `value`, or up to 2**31 - 1 more."""
        flag = self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        stream = self._current_stream()
        self._call(self._driver.cuStreamWaitValue32, stream, address, value, flag.value)
