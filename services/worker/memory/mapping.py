"""What is mapped into one range: the chunks its owner has, and behind them those it had until now.

    range    [ owned ....... | stale .... | nothing ...... )
                             ^ num_owned  ^ num_mapped

Taking a mapping of touched pages away costs time by the page (about 45 us for a MiB), making one
does not. So chunks change their owner first and their old mapping goes later, in slices. Until then
a chunk is mapped twice: nobody may touch it through the **stale** mapping, which belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.worker.memory.base import ChunkRun, VirtualRange
from services.worker.memory.errors import DeviceMemoryError


class RangeMapping:
    """Maps chunks into a range at the end of those that are there. Counts are of chunks."""

    def __init__(self, reserved: VirtualRange) -> None:
        self.range = reserved
        self._num_owned = 0
        self._num_mapped = 0

    @property
    def num_owned(self) -> int:
        """Chunks that may be touched, from the first address on."""
        return self._num_owned

    @property
    def num_stale(self) -> int:
        """Chunks behind those that are still mapped and have other owners, or none."""
        return self._num_mapped - self._num_owned

    def extend(self, runs: Sequence[ChunkRun]) -> None:
        """Map `runs` behind what is owned: all or, where an error is raised, none.

        Raises:
            DeviceMemoryError: the system refused.
        """
        if not runs:
            return
        self.unmap_stale(self.num_stale)
        try:
            for run in runs:
                self.range.map(self._num_mapped, run)
                self._num_mapped += run.count
        except DeviceMemoryError:
            self.unmap_stale(self.num_stale)
            raise
        self._num_owned = self._num_mapped

    def release(self, count: int) -> None:
        """The last `count` chunks have other owners from now on; they stay mapped for a while."""
        self._num_owned -= count

    def unmap_stale(self, max_count: int) -> int:
        """Unmap up to so many stale chunks, from the end; returns how many.

        Raises:
            DeviceMemoryError: the system refused.
        """
        count = min(max_count, self.num_stale)
        if count > 0:
            self.range.unmap(self._num_mapped - count, count)
            self._num_mapped -= count
        return count
