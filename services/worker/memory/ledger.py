"""Who owns which chunk of the budget. Pure bookkeeping: nothing is mapped here.

    chunk    0    1    2    3    4    5    6    7
    owner    W0   W0   W1   W1   K0   K1   K0   -          W = weights, K = KV, - = free

    chunks of K0, in the order they are mapped:  4, 6

The order in which an owner got its chunks is the order in which they lie in its range of addresses,
so the last ones are those at the tail.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from types import MappingProxyType
from typing import NamedTuple

from services.worker.memory.base import ChunkRun
from services.worker.memory.errors import LedgerIntegrityError, OutOfChunksError
from services.worker.memory.runs import FreeRuns, coalesce


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
        self._free = FreeRuns(num_chunks)

    @property
    def num_chunks(self) -> int:
        """Chunks of the budget."""
        return len(self._owner_of)

    @property
    def num_free_chunks(self) -> int:
        """Chunks without owner."""
        return len(self._free)

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
        return list(self._free)

    def assign(self, owner: Owner, count: int) -> list[ChunkRun]:
        """Give `owner` so many free chunks, behind those it has, in as few runs as possible.

        Returns:
            The runs in the order they are to be mapped.

        Raises:
            OutOfChunksError: too few are free; nothing has changed.
        """
        if count > len(self._free):
            raise OutOfChunksError(
                f"{owner} needs {count} chunks of memory, but only {len(self._free)} are free"
            )
        runs = self._free.take(count)
        for run in runs:
            end = run.first + run.count
            self._owner_of[run.first : end] = [owner] * run.count
            self._chunks.setdefault(owner, []).extend(range(run.first, end))
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
        runs = coalesce(sorted(tail))
        for run in runs:
            self._owner_of[run.first : run.first + run.count] = [None] * run.count
            self._free.add(run)
        return runs

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
        free = {chunk for run in self._free for chunk in range(run.first, run.first + run.count)}
        if free & seen.keys() or len(seen) + len(free) != len(self._owner_of):
            raise LedgerIntegrityError(
                f"{len(seen)} owned and {len(free)} free chunks are not the"
                f" {len(self._owner_of)} of the budget"
            )
