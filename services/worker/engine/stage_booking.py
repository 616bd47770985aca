"""How many blocks each request holds on another worker, as its leader books them.

A stage hands out its own block ids, when a microbatch or an exchange needs them; the leader only
counts. It books what a request's tokens need, `ceil(tokens / block_size)`, no earlier than the
stage takes and no less, so it never schedules what the stage cannot hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from services.worker.engine.request import KvKey


class StageBooking:
    """Counts of one remote stage. `num_blocks` is what its worker granted to this leader."""

    def __init__(self, num_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self._num_held: dict[KvKey, int] = {}
        self._num_used = 0

    @property
    def num_used_blocks(self) -> int:
        """Blocks booked."""
        return self._num_used

    @property
    def num_free_blocks(self) -> int:
        """Blocks that may still be booked."""
        return self.num_blocks - self._num_used

    @property
    def held(self) -> Mapping[KvKey, int]:
        """Blocks booked for each request."""
        return MappingProxyType(self._num_held)

    def num_held(self, key: KvKey) -> int:
        """Blocks booked for `key`."""
        return self._num_held.get(key, 0)

    def hold(self, key: KvKey, num_blocks: int) -> None:
        """Book `num_blocks` for `key` in place of what it had; the caller knows that they fit."""
        self._num_used += num_blocks - self._num_held.get(key, 0)
        self._num_held[key] = num_blocks

    def release(self, key: KvKey) -> int:
        """Forget `key`; returns how many blocks it had."""
        num_blocks = self._num_held.pop(key, 0)
        self._num_used -= num_blocks
        return num_blocks
