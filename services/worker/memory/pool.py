"""One budget, two uses: arenas of weights and KV ranges made of the same chunks.

    addresses, reserved once                                    chunks of the budget
    arena  layer 0   [ weights ]                                W0 W0
    arena  layer 1   [ weights ]        <- drop: unmapped       W1 W1 --+
    KV     layer 0   [ blocks ............ | reserved ... )     K0      |
                                           ^ grow: mapped  <------------+

The chunks of a dropped layer are mapped behind the KV of the remaining layers; restoring takes them
back and maps them at the arena's old addresses. No address ever changes and nothing is copied, so
kernels, block tables and tensors need not know. What chunks leave behind is a stale mapping, which
is taken away later, and their pages in the new place are populated later (`mapping.py`): `tidy`.

What the KV gets is not zeroed: it may hold old weights. Our CPU kernel reads only rows that were
written; a device whose kernel multiplies unused rows by zero must clear what it maps.

The engine thread calls this, at batch boundaries only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.worker.memory.base import ChunkRun, FileRun, PhysicalMemory
from services.worker.memory.errors import DeviceMemoryError, LedgerIntegrityError
from services.worker.memory.ledger import ChunkLedger, Owner, OwnerKind
from services.worker.memory.mapping import RangeMapping
from services.worker.memory.sizing import chunks_for, even_growth

#: What `tidy` does in one go: some hundred microseconds of work.
_TIDY_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Arena:
    """Memory for the weights of one layer, of the embedding, or of the head."""

    name: str
    address: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class KvRegion:
    """Memory for the KV of one layer: block `b` lies at `address + b * block_bytes`."""

    layer: int
    address: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Where the budget is, in whole chunks; the three parts are the budget."""

    weight_bytes: int
    kv_bytes: int
    free_bytes: int


class MemoryPool:
    """Maps the chunks of a budget to weights and KV, and knows who has them."""

    def __init__(self, physical: PhysicalMemory) -> None:
        self._physical = physical
        self._ledger = ChunkLedger(physical.num_chunks)
        #: Rises whenever chunks get or lose an owner.
        self.num_changes = 0
        self._mappings: dict[Owner, RangeMapping] = {}
        self._arenas: dict[str, Arena] = {}
        self._regions: dict[int, KvRegion] = {}
        self._filled: set[int] = set()  # chunks that held weights, so that their pages are there

    @property
    def shareable_file(self) -> int | None:
        """A file that is the budget, where the device has one; see `PhysicalMemory`."""
        return self._physical.shareable_file

    @property
    def budget_bytes(self) -> int:
        """All chunks of the budget."""
        return self._physical.num_chunks * self._physical.chunk_bytes

    @property
    def chunk_bytes(self) -> int:
        """The unit that moves between weights and KV."""
        return self._physical.chunk_bytes

    @property
    def usage(self) -> MemoryUsage:
        """How the budget is used now."""
        return MemoryUsage(
            weight_bytes=self._ledger.count_kind(OwnerKind.WEIGHTS) * self.chunk_bytes,
            kv_bytes=self._ledger.count_kind(OwnerKind.KV) * self.chunk_bytes,
            free_bytes=self._ledger.num_free_chunks * self.chunk_bytes,
        )

    # --- weights ---------------------------------------------------------------------------------

    def weight_arena(self, name: str, nbytes: int) -> Arena:
        """Make an arena and map it. Its content is undefined until it is written.

        Raises:
            ValueError: there is one of that name.
            OutOfChunksError: too little of the budget is free.
        """
        if name in self._arenas:
            raise ValueError(f"there is an arena {name!r} already")
        owner = Owner(OwnerKind.WEIGHTS, name)
        reserved = self._physical.reserve(nbytes)
        self._mappings[owner] = RangeMapping(reserved)
        try:
            self._map_tail(owner, chunks_for(nbytes, self.chunk_bytes))
        except DeviceMemoryError:
            self._mappings.pop(owner).range.close()
            raise
        self._arenas[name] = Arena(name, reserved.address, nbytes)
        return self._arenas[name]

    def is_mapped(self, name: str) -> bool:
        """True if the weights of arena `name` may be touched, False while it is dropped."""
        return self._ledger.count(self._weights_of(name)) > 0

    def drop_arena(self, name: str) -> None:
        """Free the chunks of an arena; its addresses stay reserved, its content is gone.

        Nothing happens to one that is dropped already.
        """
        owner = self._weights_of(name)
        self._release_tail(owner, self._ledger.count(owner))

    def restore_arena(self, name: str) -> None:
        """Map a dropped arena at its old addresses; its content is undefined until written.

        Nothing happens to one that is mapped.

        Raises:
            OutOfChunksError: too few chunks are free; shrink the KV first.
        """
        owner = self._weights_of(name)
        if not self.is_mapped(name):
            self._map_tail(owner, chunks_for(self._arenas[name].nbytes, self.chunk_bytes))

    def locate_arena(self, name: str, start: int, end: int) -> list[FileRun]:
        """Where the bytes `[start, end)` of a mapped arena lie in `shareable_file`."""
        return self._locate(self._weights_of(name), start, end)

    def _weights_of(self, name: str) -> Owner:
        if name not in self._arenas:
            raise ValueError(f"there is no arena {name!r}")
        return Owner(OwnerKind.WEIGHTS, name)

    # --- KV --------------------------------------------------------------------------------------

    def kv_region(self, layer: int, block_bytes: int) -> KvRegion:
        """Reserve the KV range of a layer, as long as the budget; nothing is mapped yet.

        Raises:
            ValueError: the layer has one.
        """
        if layer in self._regions:
            raise ValueError(f"layer {layer} has a KV range already")
        if block_bytes < 1:
            raise ValueError(f"a block of {block_bytes} bytes holds nothing")
        reserved = self._physical.reserve(self.budget_bytes)
        self._mappings[self._kv_of(layer)] = RangeMapping(reserved)
        self._regions[layer] = KvRegion(layer, reserved.address, block_bytes)
        return self._regions[layer]

    def num_kv_blocks(self, layers: Sequence[int]) -> int:
        """Blocks that are usable in every one of `layers`."""
        return min(
            (
                self._ledger.count(self._kv_of(layer))
                * self.chunk_bytes
                // self._regions[layer].block_bytes
                for layer in layers
            ),
            default=0,
        )

    def grow_kv_evenly(self, layers: Sequence[int]) -> int:
        """Map free chunks behind the KV of `layers` so that they share as many blocks as possible.

        Returns:
            The number of usable blocks. Blocks that were usable before keep their content.
        """
        growth = even_growth(
            [self._ledger.count(self._kv_of(layer)) for layer in layers],
            [self._regions[layer].block_bytes for layer in layers],
            self._ledger.num_free_chunks,
            self.chunk_bytes,
        )
        for layer, count in zip(layers, growth, strict=True):
            self._map_tail(self._kv_of(layer), count)
        return self.num_kv_blocks(layers)

    def populate_kv(self, layers: Iterable[int], num_blocks: int) -> None:
        """Populate the first blocks of `layers`, as far as that is due: they are about to be used.

        Blocks are handed out lowest first, so those below are in use or will be next.
        """
        for layer in layers:
            size = num_blocks * self._regions[layer].block_bytes
            self._mappings[self._kv_of(layer)].populate_to(chunks_for(size, self.chunk_bytes))

    def shrink_kv(self, layers: Sequence[int], num_blocks: int) -> None:
        """Free the chunks of `layers` that hold nothing of their first `num_blocks` blocks."""
        for layer in layers:
            owner = self._kv_of(layer)
            kept = chunks_for(num_blocks * self._regions[layer].block_bytes, self.chunk_bytes)
            self._release_tail(owner, max(0, self._ledger.count(owner) - kept))

    def locate_kv(self, layer: int, first_block: int, end_block: int) -> list[FileRun]:
        """Where mapped blocks `[first_block, end_block)` of a layer lie in `shareable_file`."""
        block_bytes = self._regions[layer].block_bytes
        return self._locate(self._kv_of(layer), first_block * block_bytes, end_block * block_bytes)

    @staticmethod
    def _kv_of(layer: int) -> Owner:
        return Owner(OwnerKind.KV, str(layer))

    # --- all -------------------------------------------------------------------------------------

    @property
    def stale_bytes(self) -> int:
        """What is still mapped where it may not be touched any more."""
        return sum(mapping.num_stale for mapping in self._mappings.values()) * self.chunk_bytes

    def unmap_stale(self, max_bytes: int) -> None:
        """Take away stale mappings of up to `max_bytes`, but of one chunk at least.

        Raises:
            DeviceMemoryError: the system refused.
        """
        num_left = max(1, max_bytes // self.chunk_bytes)
        for mapping in self._mappings.values():
            num_left -= mapping.unmap_stale(num_left)

    def trim(self) -> None:
        """Let the system use the memory of free chunks; they stay part of the budget."""
        self.unmap_stale(self.stale_bytes)
        for run in self._ledger.free_runs():
            self._physical.discard(run)
            self._filled.difference_update(_chunks(run))

    @property
    def is_populated(self) -> bool:
        """True if nothing is to be populated yet."""
        return not any(mapping.num_unpopulated for mapping in self._mappings.values())

    @property
    def is_tidy(self) -> bool:
        """True if nothing is put off."""
        return self.is_populated and not any(each.num_stale for each in self._mappings.values())

    def tidy(self) -> None:
        """Do a little of what was put off, that first which saves time to whoever uses the memory.

        Raises:
            DeviceMemoryError: the system refused.
        """
        coldest = max(self._mappings.values(), key=lambda mapping: mapping.num_unpopulated)
        if not coldest.populate(max(1, _TIDY_BYTES // self.chunk_bytes)):
            self.unmap_stale(_TIDY_BYTES)

    def check_integrity(self) -> None:
        """Raise LedgerIntegrityError unless every chunk is free or has one owner, who maps it."""
        self._ledger.check_integrity()
        for owner, mapping in self._mappings.items():
            if mapping.num_owned != self._ledger.count(owner):
                raise LedgerIntegrityError(
                    f"{owner} has {self._ledger.count(owner)} chunks, but {mapping.num_owned}"
                    " are mapped as its own"
                )
        if missing := self._ledger.owners.keys() - self._mappings.keys():
            raise LedgerIntegrityError(f"{missing.pop()} has chunks without addresses")
        for arena in self._arenas.values():
            count = self._ledger.count(Owner(OwnerKind.WEIGHTS, arena.name))
            if count not in (0, chunks_for(arena.nbytes, self.chunk_bytes)):
                raise LedgerIntegrityError(f"arena {arena.name} is mapped in part")

    def close(self) -> None:
        """Unmap everything and give the budget back; no tensor may be touched afterwards."""
        for mapping in self._mappings.values():
            mapping.range.close()
        self._physical.close()

    def _map_tail(self, owner: Owner, count: int) -> None:
        """Assign chunks and map them behind those that `owner` has: all of them or none."""
        runs = self._ledger.assign(owner, count)
        self.num_changes += 1
        chunks = {chunk for run in runs for chunk in _chunks(run)}
        is_kv = owner.kind is OwnerKind.KV
        try:
            self._mappings[owner].extend(runs, populates=is_kv and chunks <= self._filled)
        except DeviceMemoryError:
            self._ledger.release_tail(owner, count)
            raise
        if not is_kv:
            self._filled |= chunks

    def _release_tail(self, owner: Owner, count: int) -> None:
        """Free the last `count` chunks of `owner`; what maps them is stale from now on."""
        if count > 0:
            self.num_changes += 1
            self._mappings[owner].release(count)
            self._ledger.release_tail(owner, count)

    def _locate(self, owner: Owner, start: int, end: int) -> list[FileRun]:
        """Where bytes of an owner's range lie in the file: chunk by chunk, neighbours joined."""
        chunks, size = self._ledger.owners.get(owner, []), self.chunk_bytes
        if not 0 <= start <= end <= len(chunks) * size:
            raise ValueError(f"bytes [{start}, {end}) of the {owner} are not mapped")
        runs: list[FileRun] = []
        for index in range(start // size, -(-end // size)):
            first, last = max(start, index * size), min(end, (index + 1) * size)
            offset, nbytes = chunks[index] * size + first - index * size, last - first
            if runs and sum(runs[-1]) == offset:
                offset, nbytes = runs[-1].offset, runs.pop().nbytes + nbytes
            runs.append(FileRun(offset, nbytes))
        return runs


def _chunks(run: ChunkRun) -> range:
    return range(run.first, run.first + run.count)
