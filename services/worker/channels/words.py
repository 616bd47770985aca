"""Words of host memory that streams of two processes write and wait for.

    word    0       1          2           3          4           5 ...
            proof   filled 0   drained 0   filled 1   drained 1   ...     a pair for each slot

A word counts how often its slot was filled, or drained. The sender's device writes `filled`, behind
the tensor, and the receiver's waits for it; the receiver's device writes `drained`, behind all that
reads the tensor, and the sender's host looks at it. So nothing on the sender's device ever waits,
and what waits on the receiver's is let go by its own host, should the sender die.
"""

from __future__ import annotations

import mmap

import numpy as np

from services.worker.channels.ipc_driver import IpcDriver
from services.worker.links.files import map_sealed

_WORD_BYTES = 4
#: More than any slot is ever filled; streams compare cyclically, so no more than 2**31 - 1.
_RELEASED = 2**31 - 1
PROOF = 0


def filled(slot: int) -> int:
    """Index of the word."""
    return 1 + 2 * slot


def drained(slot: int) -> int:
    """Index of the word."""
    return 2 + 2 * slot


def words_bytes(num_slots: int) -> int:
    """Whole pages for the words of so many slots."""
    return -(-_WORD_BYTES * (1 + 2 * num_slots) // mmap.PAGESIZE) * mmap.PAGESIZE


class SharedWords:
    """One process's view of the words of one receiver."""

    def __init__(self, driver: IpcDriver, file: int, num_slots: int) -> None:
        """Map a file, which may be closed afterwards, and show it to the device.

        Raises:
            LinkError: the file is not what it should be.
            DeviceMemoryError: the device cannot use host memory.
        """
        self._driver = driver
        nbytes = words_bytes(num_slots)
        self._words = np.frombuffer(map_sealed(file, nbytes), np.uint32)
        self._num_words = 1 + 2 * num_slots
        self._host_address = int(self._words.ctypes.data)
        self._device_address = driver.register(self._host_address, nbytes)

    def __getitem__(self, index: int) -> int:
        """A word as the host sees it now."""
        return int(self._words[index])

    def launch_write(self, index: int, value: int) -> None:
        """Have the current stream write a word."""
        self._driver.write_value(self._device_address + _WORD_BYTES * index, value)

    def launch_wait(self, index: int, value: int) -> None:
        """Have the current stream wait until a word is at least `value`."""
        self._driver.wait_value(self._device_address + _WORD_BYTES * index, value)

    def release(self) -> None:
        """Let go every stream that waits for a slot to be filled. From any thread, at any time."""
        self._words[filled(0) : self._num_words : 2] = _RELEASED

    def close(self) -> None:
        """Take the words away from the device, which must be done with them."""
        self._driver.unregister(self._host_address)
