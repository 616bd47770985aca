"""Which KV blocks of this worker are free, and which request holds which.

    block id   0   1   2   3   4   5   6   7   8 | 9 ...        num_blocks = 9
               A   A   B   -   B   C   -   -   - |
                           ^ next one handed out | a grown pool adds ids here

A block id names the same rows in the KV range of every layer. Ids are handed out lowest first, so
that the tail of the pool is usually empty when memory shall be taken away from it. Called by the
scheduler's `GroupBlocks` and by `StageBlocks` only; never touches KV memory itself.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from shared.errors import KunserveError


class BlockIntegrityError(KunserveError):
    """A block has no owner, or two; or a request's blocks do not cover its computed tokens."""


class BlockOwner(Protocol):
    """Whoever holds blocks: a request of this worker, or one of another worker's pipeline."""

    @property
    def request_id(self) -> str: ...

    @property
    def block_table(self) -> list[int]: ...

    @property
    def num_computed_tokens(self) -> int: ...


class BlockMove(NamedTuple):
    """Copy the KV of block `source` to block `destination`, in every layer."""

    source: int
    destination: int


class BlockSwap(NamedTuple):
    """Blocks `high` and `low` change places: `high` holds KV, `low` may be free."""

    high: int
    low: int


class BlockManager:
    """Allocator of `num_blocks` blocks of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_size} tokens is empty")
        self.block_size = block_size
        self._num_blocks = num_blocks
        self._free = list(range(num_blocks))  # a heap: sorted lists are

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, free or not."""
        return self._num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        """Blocks held by requests."""
        return self._num_blocks - len(self._free)

    @property
    def usage(self) -> float:
        """Share of the pool in use, 0 to 1 (vLLM's `kv_cache_usage`)."""
        return self.num_used_blocks / self._num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens occupy."""
        return -(-num_tokens // self.block_size)

    def num_missing_blocks(self, owner: BlockOwner, num_tokens: int) -> int:
        """Blocks `owner` lacks to hold its first `num_tokens` tokens."""
        return max(0, self.blocks_for(num_tokens) - len(owner.block_table))

    def allocate(self, owner: BlockOwner, num_tokens: int) -> bool:
        """Append to the owner's block table until it holds `num_tokens` tokens.

        All or nothing: returns False, having changed nothing, if too few blocks are free.
        """
        num_missing = self.num_missing_blocks(owner, num_tokens)
        if num_missing > len(self._free):
            return False
        for _ in range(num_missing):
            owner.block_table.append(heapq.heappop(self._free))
        return True

    def trim(self, owner: BlockOwner, num_tokens: int) -> None:
        """Take back the blocks of `owner` beyond its first `num_tokens` tokens."""
        num_kept = self.blocks_for(num_tokens)
        for block in owner.block_table[num_kept:]:
            heapq.heappush(self._free, block)
        del owner.block_table[num_kept:]

    def free(self, owner: BlockOwner) -> None:
        """Take back all blocks of `owner`; its table is empty afterwards."""
        for block in owner.block_table:
            heapq.heappush(self._free, block)
        owner.block_table.clear()

    def grow(self, num_blocks: int) -> None:
        """Add the ids `[old total, num_blocks)`; their memory must be mapped in every layer."""
        if num_blocks < self._num_blocks:
            raise ValueError(f"cannot grow {self._num_blocks} blocks to {num_blocks}")
        for block in range(self._num_blocks, num_blocks):
            heapq.heappush(self._free, block)
        self._num_blocks = num_blocks

    def shrink(self, num_blocks: int, owners: Iterable[BlockOwner]) -> list[BlockMove] | None:
        """Give up the ids `[num_blocks, old total)`.

        Stragglers are renamed to the lowest free ids and their tables rewritten at once; before the
        next batch the caller copies the KV as the moves say (all sources lie in the tail, all
        destinations below it, so their order does not matter) and only then unmaps the tail.
        May only be called while no batch is in flight: a batch carries block tables.

        Args:
            owners: everybody who holds blocks.

        Returns:
            The copies to make, or None, having changed nothing, if the used blocks do not fit.
        """
        if not 1 <= num_blocks <= self._num_blocks:
            raise ValueError(f"cannot shrink {self._num_blocks} blocks to {num_blocks}")
        if self.num_used_blocks > num_blocks:
            return None
        low_free = [block for block in self._free if block < num_blocks]
        heapq.heapify(low_free)
        moves = []
        for owner in owners:
            for index, block in enumerate(owner.block_table):
                if block >= num_blocks:
                    destination = heapq.heappop(low_free)
                    owner.block_table[index] = destination
                    moves.append(BlockMove(block, destination))
        self._free = low_free
        self._num_blocks = num_blocks
        return moves

    def bring_forward(
        self, first: Iterable[BlockOwner], owners: Iterable[BlockOwner]
    ) -> list[BlockSwap]:
        """Give those of `first` the lowest ids, by swapping as few as possible.

        Tables are rewritten at once; before the next batch the caller swaps the KV. No id is in two
        swaps, and `low` may be free. May only be called while no batch is in flight.

        Args:
            owners: everybody who holds blocks, `first` included.
        """
        chosen = {block for owner in first for block in owner.block_table}
        high = sorted(block for block in chosen if block >= len(chosen))
        low = [block for block in range(len(chosen)) if block not in chosen]
        swaps = [BlockSwap(*pair) for pair in zip(high, low, strict=True)]
        renamed = dict(swaps) | {low: high for high, low in swaps}
        for owner in owners:
            owner.block_table[:] = [renamed.get(block, block) for block in owner.block_table]
        self._free = [renamed.get(block, block) for block in self._free]
        heapq.heapify(self._free)
        return swaps

    def check_integrity(self, owners: Iterable[BlockOwner]) -> None:
        """Check that every block is free or belongs to exactly one of `owners`.

        Raises:
            BlockIntegrityError: naming the first block or request for which that is not so.
        """
        claims: dict[int, str] = {}
        for block in self._free:
            _claim(claims, block, "the free list")
        for owner in owners:
            for block in owner.block_table:
                _claim(claims, block, f"request {owner.request_id}")
            if owner.num_computed_tokens > len(owner.block_table) * self.block_size:
                raise BlockIntegrityError(
                    f"request {owner.request_id} has {owner.num_computed_tokens} computed"
                    f" tokens but only {len(owner.block_table)} blocks"
                )
        missing = set(range(self._num_blocks)) - claims.keys()
        if missing:
            raise BlockIntegrityError(f"block {min(missing)} is neither free nor held")
        if len(claims) > self._num_blocks:
            raise BlockIntegrityError(f"block {max(claims)} is not in the pool")


def _claim(claims: dict[int, str], block: int, owner: str) -> None:
    if block in claims:
        raise BlockIntegrityError(f"block {block} belongs to {claims[block]} and to {owner}")
    claims[block] = owner
