"""How many blocks a number of chunks gives, and whether a budget is large enough. Pure.

Blocks need not end where chunks end, because addresses are contiguous: a layer with m mapped bytes
has floor(m / block_bytes) usable blocks, and all layers together have the smallest of these.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.worker.memory.errors import DeviceMemoryTooSmallError


def chunks_for(nbytes: int, chunk_bytes: int) -> int:
    """Whole chunks that hold `nbytes`."""
    return -(-nbytes // chunk_bytes)


def even_growth(
    mapped_chunks: Sequence[int],  # [layers]
    block_bytes: Sequence[int],  # [layers]
    free_chunks: int,
    chunk_bytes: int,
) -> list[int]:
    """Chunks to add to each layer so that the layers together have as many blocks as possible.

    No chunk is spent that brings no block.
    """

    def additions(num_blocks: int) -> list[int]:
        return [
            max(0, chunks_for(num_blocks * size, chunk_bytes) - mapped)
            for mapped, size in zip(mapped_chunks, block_bytes, strict=True)
        ]

    if not block_bytes:
        return []
    total_bytes = (sum(mapped_chunks) + free_chunks) * chunk_bytes
    low, high = 0, total_bytes // sum(block_bytes)  # low fits, more than high cannot
    while low < high:
        middle = (low + high + 1) // 2
        if sum(additions(middle)) <= free_chunks:
            low = middle
        else:
            high = middle - 1
    return additions(low)


def most_blocks(
    num_chunks: int, arena_bytes: Sequence[int], block_bytes: Sequence[int], chunk_bytes: int
) -> int:
    """Blocks that every layer can have beside these arenas of weights."""
    free_chunks = num_chunks - sum(chunks_for(nbytes, chunk_bytes) for nbytes in arena_bytes)
    growth = even_growth([0] * len(block_bytes), block_bytes, free_chunks, chunk_bytes)
    return min(
        chunks * chunk_bytes // size for chunks, size in zip(growth, block_bytes, strict=True)
    )


def required_bytes(
    arena_bytes: Sequence[int], block_bytes: Sequence[int], num_blocks: int, chunk_bytes: int
) -> int:
    """The budget that holds these arenas of weights and `num_blocks` blocks of every layer."""
    chunks = sum(chunks_for(nbytes, chunk_bytes) for nbytes in arena_bytes)
    chunks += sum(chunks_for(num_blocks * size, chunk_bytes) for size in block_bytes)
    return chunks * chunk_bytes


def check_budget(
    budget_bytes: int,
    arena_bytes: Sequence[int],
    block_bytes: Sequence[int],
    min_blocks: int,
    chunk_bytes: int,
) -> None:
    """Refuse a budget that cannot serve anything, before anything is loaded.

    Args:
        arena_bytes: weights of every layer, embedding and head held.
        block_bytes: KV of one block, for every layer held.
        min_blocks: the least number of blocks worth starting with.

    Raises:
        DeviceMemoryTooSmallError: says how much is needed.
    """
    needed = required_bytes(arena_bytes, block_bytes, min_blocks, chunk_bytes)
    if budget_bytes // chunk_bytes * chunk_bytes < needed:
        weights = required_bytes(arena_bytes, (), 0, chunk_bytes)
        raise DeviceMemoryTooSmallError(
            f"device memory of {_mib(budget_bytes)} is too small: the weights take"
            f" {_mib(weights)} and the smallest KV cache {_mib(needed - weights)};"
            f" give at least {_mib(needed)}"
        )


def _mib(nbytes: int) -> str:
    """Rounded up, so that the size named is enough when it is given back as a setting."""
    return f"{-(-nbytes // 1024**2)}MiB"
