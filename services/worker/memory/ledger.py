"""Who owns which chunk of the budget. Pure bookkeeping: nothing is mapped here.

    chunk    0    1    2    3    4    5    6    7
    owner    W0   W0   W1   W1   K0   K1   K0   -          W = weights, K = KV, - = free

    chunks of K0, in the order they are mapped:  4, 6

The order in which an owner got its chunks is the order in which they lie in its range of addresses,
so the last ones are those at the tail.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum, auto
from types import MappingProxyType
from typing import NamedTuple

from services.worker.memory.base import ChunkRun
from services.worker.memory.errors import LedgerIntegrityError, OutOfChunksError


class OwnerKind(Enum):
    """What memory is used for."""

    WEIGHTS = auto()
    KV = auto()


class Owner(NamedTuple):
    """One arena of weights, or the KV of one layer."""

    kind: OwnerKind
    name: str

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} of {self.name}"


class ChunkLedger:
    """Owners of the chunks `[0, num_chunks)`; a chunk without owner is free."""

    def __init__(self, num_chunks: int) -> None:
        if num_chunks < 1:
            raise ValueError("a ledger needs at least one chunk")
        self._owner_of: list[Owner | None] = [None] * num_chunks
        self._chunks: dict[Owner, list[int]] = {}
        self._num_free = num_chunks

    @property
    def num_chunks(self) -> int:
        """Chunks of the budget."""
        return len(self._owner_of)

    @property
    def num_free_chunks(self) -> int:
        """Chunks without owner."""
        return self._num_free

    @property
    def owners(self) -> Mapping[Owner, list[int]]:
        """The chunks of every owner that has some, in the order they were assigned."""
        return MappingProxyType(self._chunks)

    def count(self, owner: Owner) -> int:
        """Chunks that `owner` has."""
        return len(self._chunks.get(owner, ()))

    def count_kind(self, kind: OwnerKind) -> int:
        """Chunks that all owners of this kind have."""
        return sum(len(chunks) for owner, chunks in self._chunks.items() if owner.kind is kind)

    def free_runs(self) -> list[ChunkRun]:
        """Free chunks as runs of neighbours, lowest first."""
        return coalesce(chunk for chunk, owner in enumerate(self._owner_of) if owner is None)

    def assign(self, owner: Owner, count: int) -> list[ChunkRun]:
        """Give `owner` so many free chunks, behind those it has, in as few runs as possible.

        Returns:
            The runs in the order they are to be mapped.

        Raises:
            OutOfChunksError: too few are free; nothing has changed.
        """
        if count > self._num_free:
            raise OutOfChunksError(
                f"{owner} needs {count} chunks of memory, but only {self._num_free} are free"
            )
        runs = _choose_runs(self.free_runs(), count)
        for run in runs:
            for chunk in range(run.first, run.first + run.count):
                self._owner_of[chunk] = owner
                self._chunks.setdefault(owner, []).append(chunk)
        self._num_free -= count
        return runs

    def release_tail(self, owner: Owner, count: int) -> list[ChunkRun]:
        """Take the last `count` chunks from `owner`; returns them as runs, lowest first."""
        chunks = self._chunks.get(owner, [])
        if not 0 <= count <= len(chunks):
            raise ValueError(f"{owner} has {len(chunks)} chunks, not {count}")
        if count == 0:
            return []
        tail = chunks[-count:]
        del chunks[-count:]
        if not chunks:
            del self._chunks[owner]
        for chunk in tail:
            self._owner_of[chunk] = None
        self._num_free += count
        return coalesce(sorted(tail))

    def check_integrity(self) -> None:
        """Raise LedgerIntegrityError unless every chunk is free or has exactly one owner."""
        seen: dict[int, Owner] = {}
        for owner, chunks in self._chunks.items():
            for chunk in chunks:
                if chunk in seen:
                    raise LedgerIntegrityError(
                        f"chunk {chunk} belongs to {seen[chunk]} and to {owner}"
                    )
                seen[chunk] = owner
        for chunk, listed in enumerate(self._owner_of):
            if seen.get(chunk) != listed:
                raise LedgerIntegrityError(
                    f"chunk {chunk} is listed as {listed or 'free'} but"
                    f" {seen.get(chunk, 'nobody')} has it"
                )
        if len(seen) + self._num_free != len(self._owner_of):
            raise LedgerIntegrityError(
                f"{len(seen)} owned and {self._num_free} free chunks are not the"
                f" {len(self._owner_of)} of the budget"
            )


def coalesce(chunks: Iterable[int]) -> list[ChunkRun]:
    """Join neighbours: `[3, 4, 5, 9]` becomes `[(3, 3), (9, 1)]`; order is kept."""
    runs: list[ChunkRun] = []
    for chunk in chunks:
        if runs and runs[-1].first + runs[-1].count == chunk:
            runs[-1] = ChunkRun(runs[-1].first, runs[-1].count + 1)
        else:
            runs.append(ChunkRun(chunk, 1))
    return runs


def _choose_runs(free: list[ChunkRun], count: int) -> list[ChunkRun]:
    """Runs with `count` chunks in all: the tightest that holds all, else the longest first."""
    chosen: list[ChunkRun] = []
    remaining = list(free)
    while count > 0:
        large_enough = [run for run in remaining if run.count >= count]
        if large_enough:
            tightest = min(large_enough, key=lambda run: run.count)
            chosen.append(ChunkRun(tightest.first, count))
            break
        longest = max(remaining, key=lambda run: run.count)
        remaining.remove(longest)
        chosen.append(longest)
        count -= longest.count
    return chosen
