"""Where the bytes of an arena come from when its layer is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from services.worker.model.checkpoint import WeightSource
from services.worker.model.plan import ArenaPlan


class ArenaSource(Protocol):
    """Fills arenas that are mapped already; the worker's checkpoint, or another worker."""

    def fill(self, arena: ArenaPlan, address: int) -> Iterator[int]:
        """Write the arena at `address`, piece by piece.

        Yields the bytes of each piece after it was written, 0 where nothing can be written now.
        """
        ...


class CheckpointSource:
    """Reads tensors through mmap and packs them."""

    def __init__(self, weights: WeightSource) -> None:
        self._weights = weights

    def fill(self, arena: ArenaPlan, address: int) -> Iterator[int]:
        """Raises CheckpointError where a tensor cannot be read."""
        return arena.layout.fill(
            address, lambda source: self._weights.tensor(arena.prefix + source)
        )
