"""The seam to the device for channels between processes of one machine.

`memory/cuda_ipc.py` is the real one; `tests/fake_ipc.py` has its rules over host memory, also
between processes.
"""

from __future__ import annotations

from typing import Protocol


class IpcDriver(Protocol):
    """Any thread may call; every refusal is a DeviceMemoryError."""

    def attach(self) -> None:
        """Let the calling thread use the device."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done all work of this process."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Address of device memory that can be exported."""
        ...

    def free(self, address: int) -> None:
        """Free what `allocate` gave; no other process may have it open."""
        ...

    def export_memory(self, address: int) -> bytes:
        """What stands for an allocation in other processes."""
        ...

    def open_memory(self, handle: bytes) -> int:
        """Map another process's allocation; returns its address here."""
        ...

    def close_memory(self, address: int) -> None:
        """Unmap it, before its owner frees it."""
        ...

    def write(self, address: int, data: bytes) -> None:
        """Copy to the device and wait for it."""
        ...

    def read(self, address: int, nbytes: int) -> bytes:
        """Copy from the device and wait for it."""
        ...

    def register(self, address: int, nbytes: int) -> int:
        """Let the device touch whole pages of host memory; returns their address there."""
        ...

    def unregister(self, address: int) -> None:
        """Take that right away, once no stream uses them."""
        ...

    def write_value(self, address: int, value: int) -> None:
        """Have the current stream write a word of 32 bits, behind all that it wrote before."""
        ...

    def wait_value(self, address: int, value: int) -> None:
        """Have the current stream wait until a word is `value`, or up to 2**31 - 1 more."""
        ...
