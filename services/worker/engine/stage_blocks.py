"""This worker's blocks that hold the KV of requests which another worker schedules.

    pool   | own requests        | held for others | granted, not used yet | free for own requests |
           |                     |<-------- granted to the group -------->|

Used by the stage of a pipeline whose leader is elsewhere, and for requests that were handed over
and whose KV still lies here. The grant is the sum of what leaders may book here; own requests leave
it alone. A request that moves to another scheduler takes the grant of its blocks along, so grants
change by differences only, and the books of worker and leaders agree in whatever order news arrive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.worker.engine.block_manager import BlockIntegrityError, BlockManager
from services.worker.engine.request import KvKey
from shared.errors import KunserveError


class StageCapacityError(KunserveError):
    """A leader wants more blocks of this worker than it was granted, or than there are."""


@dataclass(slots=True)
class _Held:
    """Blocks of one request; a `BlockOwner`."""

    request_id: str
    block_table: list[int]
    num_computed_tokens: int


class StageBlocks:
    """Blocks by key, out of the pool that this worker's own scheduler uses too."""

    def __init__(self, pool: BlockManager) -> None:
        self._pool = pool
        self._held: dict[KvKey, _Held] = {}
        self._num_used = 0
        self._num_granted = 0

    @property
    def num_used_blocks(self) -> int:
        """Blocks held."""
        return self._num_used

    @property
    def num_granted_blocks(self) -> int:
        """Blocks that leaders may book here, those held included."""
        return self._num_granted

    @property
    def num_reserved_blocks(self) -> int:
        """Free blocks of the pool that own requests must not take."""
        return self._num_granted - self._num_used

    @property
    def keys(self) -> Sequence[KvKey]:
        """Whose KV is here."""
        return tuple(self._held)

    @property
    def owners(self) -> Sequence[_Held]:
        """Everybody here, as owners of blocks."""
        return tuple(self._held.values())

    def owners_of(self, keys: Iterable[KvKey]) -> Sequence[_Held]:
        """Those of `keys` that have blocks here, as owners."""
        return tuple(self._held[key] for key in keys if key in self._held)

    def lend(self, num_blocks: int) -> None:
        """Grant `num_blocks` more; the leader is to be told (`GroupBlocks.add_capacity`).

        Raises:
            StageCapacityError: so many are not free; nothing has changed.
        """
        num_free = self._pool.num_free_blocks - self.num_reserved_blocks
        if num_blocks > num_free:
            raise StageCapacityError(f"cannot grant {num_blocks} blocks, only {num_free} are free")
        self._num_granted += num_blocks

    def take_back(self, num_blocks: int) -> None:
        """Take note that a leader gave back `num_blocks` (`GroupBlocks.give_back`).

        Raises:
            StageCapacityError: more than are granted and not in use; nothing has changed.
        """
        if num_blocks > self.num_reserved_blocks:
            raise StageCapacityError(
                f"{num_blocks} blocks are given back, but {self._num_used} of"
                f" {self._num_granted} granted ones are in use"
            )
        self._num_granted -= num_blocks

    def extend(self, key: KvKey, num_tokens: int) -> list[int]:
        """The block table of `key`, which afterwards holds `num_tokens` tokens.

        Raises:
            StageCapacityError: that needs more than is granted; nothing has changed.
        """
        held = self._held.get(key) or _Held(key.request_id, [], 0)
        num_missing = self._pool.num_missing_blocks(held, num_tokens)
        if num_missing > self.num_reserved_blocks or not self._pool.allocate(held, num_tokens):
            raise StageCapacityError(
                f"request {key.request_id} needs {num_missing} blocks more, but"
                f" {self._num_used} of {self._num_granted} granted ones are in use"
            )
        self._held[key] = held
        self._num_used += num_missing
        held.num_computed_tokens = max(held.num_computed_tokens, num_tokens)
        return held.block_table

    def block_table(self, key: KvKey) -> list[int]:
        """The blocks of `key`, in token order; KeyError if it has none here."""
        return self._held[key].block_table

    def hold(self, key: KvKey, block_table: list[int], num_tokens: int) -> None:
        """Take over the blocks of a request that leaves this worker's scheduler, as granted."""
        self._held[key] = _Held(key.request_id, block_table, num_tokens)
        self._num_used += len(block_table)
        self._num_granted += len(block_table)

    def claim(self, key: KvKey) -> list[int]:
        """Give the blocks of `key` to this worker's scheduler; the grant shrinks by them.

        KeyError if it has none here.
        """
        held = self._held.pop(key)
        self._num_used -= len(held.block_table)
        self._num_granted -= len(held.block_table)
        return held.block_table

    def release(self, key: KvKey) -> bool:
        """Free what `key` holds, which stays granted; False if that is nothing."""
        held = self._held.pop(key, None)
        if held is None:
            return False
        self._num_used -= len(held.block_table)
        self._pool.free(held)
        return True

    def release_all(self) -> None:
        """Free everything and withdraw the grant: the group is gone."""
        for key in self.keys:
            self.release(key)
        self._num_granted = 0

    def check_integrity(self) -> None:
        """Raise BlockIntegrityError unless the counts agree with what is held."""
        num_held = sum(len(held.block_table) for held in self._held.values())
        if num_held != self._num_used:
            raise BlockIntegrityError(f"{num_held} blocks are held, {self._num_used} are counted")
        if not 0 <= self.num_reserved_blocks <= self._pool.num_free_blocks:
            raise BlockIntegrityError(
                f"of {self._num_granted} granted blocks {self._num_used} are in use, and"
                f" {self._pool.num_free_blocks} are free"
            )
