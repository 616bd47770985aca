"""Chunks without owner, as runs of neighbours, so that taking some costs by runs, not by chunks.

chunks   0 1 2 3 4 5 6 7 8 9        free runs   (2, 3)  (7, 1)
         x x . . . x x . x x
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from services.worker.memory.base import ChunkRun


def coalesce(chunks: Iterable[int]) -> list[ChunkRun]:
    """Join neighbours: `[3, 4, 5, 9]` becomes `[(3, 3), (9, 1)]`; order is kept."""
    runs: list[ChunkRun] = []
    first = end = -1
    for chunk in chunks:
        if chunk != end:
            if end > first:
                runs.append(ChunkRun(first, end - first))
            first = chunk
        end = chunk + 1
    if end > first:
        runs.append(ChunkRun(first, end - first))
    return runs


class FreeRuns:
    """The free chunks; neighbours are always one run. Runs do not overlap."""

    def __init__(self, num_chunks: int) -> None:
        self._firsts = [0]  # sorted; the ends belong to them
        self._ends = [num_chunks]
        self._count = num_chunks

    def __len__(self) -> int:
        """Free chunks."""
        return self._count

    def __iter__(self) -> Iterator[ChunkRun]:
        """All runs, lowest first."""
        for first, end in zip(self._firsts, self._ends, strict=True):
            yield ChunkRun(first, end - first)

    def take(self, count: int) -> list[ChunkRun]:
        """Take so many, which must be free: the tightest run that holds all, else long ones."""
        taken: list[ChunkRun] = []
        while count > 0:
            index = self._choose(count)
            first, end = self._firsts[index], min(self._ends[index], self._firsts[index] + count)
            if end == self._ends[index]:
                del self._firsts[index], self._ends[index]
            else:
                self._firsts[index] = end
            taken.append(ChunkRun(first, end - first))
            self._count -= end - first
            count -= end - first
        return taken

    def add(self, run: ChunkRun) -> None:
        """Free a run."""
        first, end = run.first, run.first + run.count
        index = bisect_right(self._firsts, first)
        self._count += run.count
        if index < len(self._firsts) and self._firsts[index] == end:  # joins the next one
            end = self._ends[index]
            del self._firsts[index], self._ends[index]
        if index > 0 and self._ends[index - 1] == first:  # joins the one before
            self._ends[index - 1] = end
            return
        self._firsts.insert(index, first)
        self._ends.insert(index, end)

    def _choose(self, count: int) -> int:
        """Index of the tightest run of `count` chunks, or, where there is none, of the longest."""
        lengths = [end - first for first, end in zip(self._firsts, self._ends, strict=True)]
        fitting = [length for length in lengths if length >= count]
        return lengths.index(min(fitting) if fitting else max(lengths))
