"""CUDA's memory between processes, over host memory: the same rules, and real processes.

An allocation is a memfd; its handle names the process and the descriptor, and who opens it maps the
same memory and locks the file, as long as it is there. Streams do at once what they are told, so a
stream that would wait for something that was not launched before waits for ever: that is an error.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import secrets
import threading
import time
from dataclasses import dataclass

import numpy as np

from services.worker.memory.errors import DeviceMemoryError
from tests.refusals import RefusableCalls

_HANDLE_BYTES = 64
#: The device sees host memory at other addresses than the host.
_DEVICE_OFFSET = 1 << 60
_WORD_BYTES = 4


@dataclass
class _Mapped:
    """Device memory, one's own or another process's."""

    file: int
    memory: mmap.mmap

    @property
    def address(self) -> int:
        return int(np.frombuffer(self.memory, np.uint8).ctypes.data)


class FakeIpcDriver(RefusableCalls):
    """Implements `IpcDriver`. Each is a process of its own, also where it is not.

    Args:
        patience_seconds: how long a stream may wait for what is written meanwhile.
    """

    def __init__(self, patience_seconds: float = 0.0) -> None:
        super().__init__()
        self.patience_seconds = patience_seconds
        self._name = secrets.token_hex(8)
        self._allocated: dict[int, _Mapped] = {}
        self._opened: dict[int, _Mapped] = {}
        self._registered: dict[int, int] = {}  # size by address
        self._attached = threading.local()
        self.attach()

    @property
    def is_idle(self) -> bool:
        """True if nothing is left of anything."""
        return not (self._allocated or self._opened or self._registered)

    def attach(self) -> None:
        self._attached.is_here = True

    def synchronize(self) -> None:
        self._enter("synchronize")

    # --- device memory ---------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> int:
        self._enter("allocate")
        file = os.memfd_create("fake-ipc", os.MFD_CLOEXEC)
        os.ftruncate(file, nbytes)
        mapped = _Mapped(file, mmap.mmap(file, nbytes))
        self._allocated[mapped.address] = mapped
        return mapped.address

    def free(self, address: int) -> None:
        self._enter("free")
        mapped = self._of(self._allocated, address)
        file = os.open(f"/proc/self/fd/{mapped.file}", os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DeviceMemoryError("free: another process has it open") from error
        finally:
            os.close(file)
        del self._allocated[address]
        os.close(mapped.file)

    def export_memory(self, address: int) -> bytes:
        self._enter("export_memory")
        mapped = self._of(self._allocated, address)
        return f"{os.getpid()}/{mapped.file}/{self._name}".encode().ljust(_HANDLE_BYTES)

    def open_memory(self, handle: bytes) -> int:
        self._enter("open_memory")
        pid, number, name = handle.decode().strip().split("/")
        if name == self._name:
            raise DeviceMemoryError("open_memory: it is this process's own")
        try:
            file = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
        except OSError as error:
            raise DeviceMemoryError("open_memory: invalid device context") from error
        fcntl.flock(file, fcntl.LOCK_SH)
        mapped = _Mapped(file, mmap.mmap(file, os.fstat(file).st_size))
        self._opened[mapped.address] = mapped
        return mapped.address

    def close_memory(self, address: int) -> None:
        self._enter("close_memory")
        os.close(self._of(self._opened, address).file)
        del self._opened[address]

    def write(self, address: int, data: bytes) -> None:
        self._enter("write")
        ctypes.memmove(address, data, len(data))

    def read(self, address: int, nbytes: int) -> bytes:
        self._enter("read")
        return ctypes.string_at(address, nbytes)

    # --- words of host memory --------------------------------------------------------------------

    def register(self, address: int, nbytes: int) -> int:
        self._enter("register")
        if address % mmap.PAGESIZE or nbytes % mmap.PAGESIZE or address in self._registered:
            raise DeviceMemoryError("register: not whole pages, or registered already")
        self._registered[address] = nbytes
        return address + _DEVICE_OFFSET

    def unregister(self, address: int) -> None:
        self._enter("unregister")
        if address not in self._registered:
            raise DeviceMemoryError("unregister: not registered")
        del self._registered[address]

    def write_value(self, address: int, value: int) -> None:
        self._enter("write_value")
        self._word(address).value = value

    def wait_value(self, address: int, value: int) -> None:
        self._enter("wait_value")
        word, ends_at = self._word(address), time.monotonic() + self.patience_seconds
        while ctypes.c_int32(word.value - value).value < 0:
            if time.monotonic() > ends_at:
                raise DeviceMemoryError(f"wait_value: {word.value} will never be {value}")
            time.sleep(0.001)

    # --- rules -----------------------------------------------------------------------------------

    def _enter(self, name: str) -> None:
        self.note(name)
        if not getattr(self._attached, "is_here", False):
            raise DeviceMemoryError(f"{name}: no context is current in this thread")

    def _of(self, mapped: dict[int, _Mapped], address: int) -> _Mapped:
        if address not in mapped:
            raise DeviceMemoryError(f"nothing of the kind is at {address:#x}")
        return mapped[address]

    def _word(self, address: int) -> ctypes.c_uint32:
        host_address = address - _DEVICE_OFFSET
        is_registered = any(
            start <= host_address <= start + size - _WORD_BYTES
            for start, size in self._registered.items()
        )
        if not is_registered or host_address % _WORD_BYTES:
            raise DeviceMemoryError(f"the device cannot touch {address:#x}")
        return ctypes.c_uint32.from_address(host_address)
