"""What is mapped into one range: the chunks its owner has, and behind them those it had until now.

    range    [ populated ... | owned ..... | stale .... | nothing ...... )
                             ^ num_populated            ^ num_mapped
                                           ^ num_owned

Taking a mapping of touched pages away costs time by the page (about 45 us for a MiB), making one
does not. So chunks change their owner first and their old mapping goes later, in slices. Until then
a chunk is mapped twice: nobody may touch it through the **stale** mapping, which belongs to nobody.

In the new mapping every page costs again, when it is first touched (450 us for a MiB), or less
(170 us) where the pages are **populated** together. That is put off, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.worker.memory.base import ChunkRun, VirtualRange
from services.worker.memory.errors import DeviceMemoryError


class RangeMapping:
    """Maps chunks into a range at the end of those that are there. Counts are of chunks."""

    def __init__(self, reserved: VirtualRange) -> None:
        self.range = reserved
        self._num_populated = 0
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

    @property
    def num_unpopulated(self) -> int:
        """Owned chunks that are to be populated yet."""
        return self._num_owned - self._num_populated

    def extend(self, runs: Sequence[ChunkRun], *, populates: bool = False) -> None:
        """Map `runs` behind what is owned: all or, where an error is raised, none.

        Args:
            populates: their pages are there and will be needed: worth populating later.

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
        if not populates:
            self._num_populated = self._num_owned

    def populate(self, max_count: int) -> int:
        """Populate up to so many of the chunks that are due, lowest first; returns how many."""
        return self.populate_to(self._num_populated + max_count)

    def populate_to(self, end: int) -> int:
        """Populate what is due below the `end`-th chunk; returns how many chunks that were."""
        count = min(end, self._num_owned) - self._num_populated
        if count <= 0:
            return 0
        self.range.populate(self._num_populated, count)
        self._num_populated += count
        return count

    def release(self, count: int) -> None:
        """The last `count` chunks have other owners from now on; they stay mapped for a while."""
        self._num_owned -= count
        self._num_populated = min(self._num_populated, self._num_owned)

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
