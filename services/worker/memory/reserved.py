"""The addresses of a `VirtualRange`, whatever device they are of: where its chunks lie."""

from __future__ import annotations

from collections.abc import Callable


class ReservedRange:
    """Addresses for whole chunks; CPU and CUDA ranges add what maps and unmaps them."""

    def __init__(self, nbytes: int, chunk_bytes: int, reserve: Callable[[int], int]) -> None:
        """Reserve addresses for at least `nbytes`, one chunk if that is less.

        Args:
            reserve: takes bytes, gives the first address.
        """
        self._chunk_bytes = chunk_bytes
        self._num_chunks = max(1, -(-nbytes // chunk_bytes))
        self._address = reserve(self.reserved_bytes)

    @property
    def address(self) -> int:
        """First address of the range."""
        return self._address

    @property
    def reserved_bytes(self) -> int:
        """Length of the range."""
        return self._num_chunks * self._chunk_bytes

    def _part(self, position: int, count: int) -> tuple[int, int]:
        """Address and length of `count` chunks from `position` on; nothing may leave the range."""
        if position < 0 or count < 1 or position + count > self._num_chunks:
            raise ValueError(
                f"chunks [{position}, {position + count}) are not within a range of"
                f" {self._num_chunks}"
            )
        return self._address + position * self._chunk_bytes, count * self._chunk_bytes
