"""Which KV blocks are free, and which request holds which.

    block id   0   1   2   3   4   5   6   7   8 | 9 ...        num_blocks = 9
               A   A   B   -   B   C   -   -   - |
                           ^ next one handed out | a grown pool adds ids here

A block id names the same rows in the KV range of every layer. Ids are handed out lowest first, so
that the tail of the pool is usually empty when memory shall be taken away from it. Called by the
scheduler only; never touches KV memory itself.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple

from services.worker.engine.request import Request
from shared.errors import KunserveError


class BlockIntegrityError(KunserveError):
    """A block has no owner, or two; or a request's blocks do not cover its computed tokens."""


class BlockMove(NamedTuple):
    """Copy the KV of block `source` to block `destination`, in every layer."""

    request: Request
    source: int
    destination: int


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

    def num_missing_blocks(self, request: Request, num_tokens: int) -> int:
        """Blocks `request` lacks to hold its first `num_tokens` tokens."""
        return max(0, self.blocks_for(num_tokens) - len(request.block_table))

    def can_allocate(self, request: Request, num_tokens: int, spare_blocks: int = 0) -> bool:
        """True if `allocate` would succeed and leave `spare_blocks` blocks free."""
        return self.num_missing_blocks(request, num_tokens) + spare_blocks <= len(self._free)

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Append to the request's block table until it holds `num_tokens` tokens.

        All or nothing: returns False, having changed nothing, if too few blocks are free.
        """
        num_missing = self.num_missing_blocks(request, num_tokens)
        if num_missing > len(self._free):
            return False
        for _ in range(num_missing):
            request.block_table.append(heapq.heappop(self._free))
        return True

    def free(self, request: Request) -> None:
        """Take back all blocks of `request`; its table is empty afterwards."""
        for block in request.block_table:
            heapq.heappush(self._free, block)
        request.block_table.clear()

    def grow(self, num_blocks: int) -> None:
        """Add the ids `[old total, num_blocks)`; their memory must be mapped in every layer."""
        if num_blocks < self._num_blocks:
            raise ValueError(f"cannot grow {self._num_blocks} blocks to {num_blocks}")
        for block in range(self._num_blocks, num_blocks):
            heapq.heappush(self._free, block)
        self._num_blocks = num_blocks

    def shrink(self, num_blocks: int, requests: Iterable[Request]) -> list[BlockMove] | None:
        """Give up the ids `[num_blocks, old total)`.

        Stragglers are renamed to the lowest free ids and their tables rewritten at once; before the
        next batch the caller copies the KV as the moves say (all sources lie in the tail, all
        destinations below it, so their order does not matter) and only then unmaps the tail.
        May only be called while no batch is in flight: a batch carries block tables.

        Args:
            requests: everybody who holds blocks.

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
        for request in requests:
            for index, block in enumerate(request.block_table):
                if block >= num_blocks:
                    destination = heapq.heappop(low_free)
                    request.block_table[index] = destination
                    moves.append(BlockMove(request, block, destination))
        self._free = low_free
        self._num_blocks = num_blocks
        return moves

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Check that every block is free or belongs to exactly one of `requests`.

        Raises:
            BlockIntegrityError: naming the first block or request for which that is not so.
        """
        owners: dict[int, str] = {}
        for block in self._free:
            _claim(owners, block, "the free list")
        for request in requests:
            for block in request.block_table:
                _claim(owners, block, f"request {request.request_id}")
            if request.num_computed_tokens > len(request.block_table) * self.block_size:
                raise BlockIntegrityError(
                    f"request {request.request_id} has {request.num_computed_tokens} computed"
                    f" tokens but only {len(request.block_table)} blocks"
                )
        missing = set(range(self._num_blocks)) - owners.keys()
        if missing:
            raise BlockIntegrityError(f"block {min(missing)} is neither free nor held")
        if len(owners) > self._num_blocks:
            raise BlockIntegrityError(f"block {max(owners)} is not in the pool")


def _claim(owners: dict[int, str], block: int, owner: str) -> None:
    if block in owners:
        raise BlockIntegrityError(f"block {block} belongs to {owners[block]} and to {owner}")
    owners[block] = owner
