"""Carries requests' KV between the members of a group, as the leader orders. Engine thread.

    order seen by all members --> source: gather, send     destination: room made, parts awaited
                                             \\--KvPart------------> wait, write, tell of the last
                                     may send more <--KvTaken-------------'

A GPU writes by itself, and after what came from the other one's GPU: a request's KV is told to be
there when the device has written it, if no member is gone by then.

Of members that may read each other's memory, the source sends where the blocks lie instead. They
must stay there until they are taken: `is_read` says so to whoever would move them.

A request's KV travels in small parts, gathered one by one between two batches: the link sends one
while the next is gathered, and small buffers are used again where large ones would be new pages
each time. What has come waits, too, so that a batch behind it does not wait for it to be written; a
window bounds what may lie in buffers beside the budget. Orders come down the chain and parts come
directly, so a part may be early. A part whose request is gone is discarded.
"""

from __future__ import annotations

import functools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from services.worker.channels.base import Packed
from services.worker.engine.request import KvKey
from services.worker.engine.routes import Transfer
from services.worker.links.base import LinkClass, LinkDownError
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.device_mark import IsPast, mark
from services.worker.pipeline.kv_transfer import (
    READ_PART_BYTES,
    cut_parts,
    gather_kv,
    locate_kv,
    read_kv,
    scatter_kv,
)
from services.worker.pipeline.messages import FrameKind, KvPart, KvTaken, Order
from services.worker.pipeline.peers import BulkContent, GroupPeers
from services.worker.work_pacer import WorkPacer

#: The blocks of a key on this worker, in token order; None if it has none (any more).
TableLookup = Callable[[KvKey], Sequence[int] | None]

#: Share of the time that sending and writing may take while batches run: requests stand still
#: meanwhile.
_SHARE = 0.5
_WINDOW_BYTES = 16 * 1024 * 1024


@dataclass(slots=True)
class _Awaited:
    """An order that this worker gets KV by."""

    key: KvKey
    num_parts: int  # that have not come


@dataclass(frozen=True, slots=True)
class _Landing:
    """All KV of a key is being written."""

    key: KvKey
    is_written: IsPast


class KvCourier:
    """One member's side of all exchanges of a group.

    Attributes:
        num_bytes: of KV sent and received so far.
        began_at: when the first order came, on the clock of `time.perf_counter`.
    """

    def __init__(
        self,
        peers: GroupPeers,
        runner: ModelRunner,
        lookup: TableLookup,
        on_filled: Callable[[KvKey], None],
        window_bytes: int = _WINDOW_BYTES,
    ) -> None:
        """Begin.

        Args:
            on_filled: everything that an order sends here of a key is written.
            window_bytes: sent to one member and not taken by it yet, about.
        """
        self.num_bytes = 0
        self.began_at: float | None = None
        self._peers = peers
        self._runner = runner
        self._lookup = lookup
        self._on_filled = on_filled
        self._window_bytes = window_bytes
        self._serial = 0
        self._awaited: dict[int, _Awaited] = {}  # by serial
        self._arrived: deque[tuple[KvPart, Packed]] = deque()
        self._early: list[tuple[KvPart, Packed]] = []
        self._landing: deque[_Landing] = deque()
        self._outgoing: dict[str, deque[KvPart]] = {}  # by destination
        self._in_transit: Counter[str] = Counter()  # bytes by destination
        self._taken: Counter[str] = Counter()  # bytes by source, not told yet
        self._pacer = WorkPacer(time.perf_counter(), _SHARE, runner.activity)

    def obey(self, order: Order) -> None:
        """Note what to send, and what will come; room for that has been made.

        Raises:
            KeyError: this worker has nothing of a request whose KV it shall send.
        """
        self._serial = order.serial
        self.began_at = self.began_at or time.perf_counter()
        here = self._peers.worker_id
        num_awaited = 0
        for transfer in order.transfers:
            source, destination = transfer.source, transfer.destination
            if destination == here:
                num_awaited += len(self._parts(order, transfer, source))
            elif source == here:
                if self._lookup(order.key) is None:
                    raise KeyError(f"no KV of request {order.key.request_id} is here")
                self._start(destination, self._parts(order, transfer, destination))
        self._await(order, num_awaited)
        early, self._early = self._early, []
        for part, packed in early:
            self.take(part, packed)

    def take(self, part: KvPart, packed: Packed) -> None:
        """Keep a part until there is time to write it."""
        parts = self._arrived if part.serial <= self._serial else self._early
        parts.append((part, packed))

    def taken(self, message: KvTaken) -> None:
        """A member has room for more."""
        self._in_transit[message.worker_id] -= message.num_bytes

    @property
    def is_read(self) -> bool:
        """True while a member may be reading blocks here: they must stay where they are."""
        return any(
            num_bytes > 0 and self._peers.memory_of(destination) is not None
            for destination, num_bytes in self._in_transit.items()
        )

    @property
    def is_busy(self) -> bool:
        """True while `pump` has something to write, to send or to tell."""
        return bool(self._landing) or self._has_parts

    @property
    def _has_parts(self) -> bool:
        return bool(self._arrived) or any(self._ready_destinations())

    def pump(self) -> None:
        """Write and send in turn for as long as it may take now, and as long as links take it."""
        if self._has_parts:
            self._move_parts()
        while self._landing and self._landing[0].is_written():
            landed = self._landing.popleft()
            if self._peers.is_connected:  # else what was written may be garbage
                self._on_filled(landed.key)

    def _move_parts(self) -> None:
        now = time.perf_counter()
        ends_at = now + self._pacer.grant(now)
        while now < ends_at and self._has_parts:
            if self._arrived:
                self._take_in(*self._arrived.popleft())
            for destination in self._ready_destinations():
                self._send(destination, self._outgoing[destination].popleft())
            now = time.perf_counter()
        self._pacer.used(now)

    # --- sending ---------------------------------------------------------------------------------

    def _start(self, destination: str, parts: list[KvPart]) -> None:
        """Tell at once where to read; what is to be gathered waits until there is time for it."""
        if self._peers.memory_of(destination) is None:
            self._outgoing.setdefault(destination, deque()).extend(parts)
            return
        for part in parts:
            self._send(destination, part)

    def _ready_destinations(self) -> Iterator[str]:
        """Members that something is to be sent to and that take it now."""
        for destination, parts in self._outgoing.items():
            is_open = self._in_transit[destination] < self._window_bytes
            if parts and is_open and not self._peers.is_clogged(destination, LinkClass.EXCHANGE):
                yield destination

    def _send(self, destination: str, part: KvPart) -> None:
        table = self._lookup(part.key)
        if table is None:  # nobody wants it any more
            return
        blocks, num_bytes = table[slice(*part.blocks)], self._num_bytes(part)
        content = None
        if self._peers.memory_of(destination) is not None:
            runs = tuple(locate_kv(self._runner, blocks, *part.layers))
            part = part.model_copy(update={"runs": runs})
        else:
            write = functools.partial(gather_kv, self._runner, blocks, *part.layers)
            content = BulkContent(num_bytes, write)
        self.num_bytes += num_bytes
        self._in_transit[destination] += num_bytes
        self._peers.send_bulk(destination, LinkClass.EXCHANGE, FrameKind.KV_PART, part, content)

    def _parts(self, order: Order, transfer: Transfer, peer: str) -> list[KvPart]:
        """The parts of a transfer, as many at both ends; `peer` is at the other one."""
        num_blocks = -(-order.num_tokens // self._runner.block_size)
        part_bytes = READ_PART_BYTES
        if self._peers.memory_of(peer) is None:
            part_bytes = self._peers.part_bytes(peer)
        shapes = cut_parts(
            transfer.start, transfer.end, num_blocks, self._runner.kv_block_bytes, part_bytes
        )
        return [
            KvPart(
                serial=order.serial,
                key=order.key,
                source=transfer.source,
                layers=shape.layers,
                blocks=shape.blocks,
            )
            for shape in shapes
        ]

    def _num_bytes(self, part: KvPart) -> int:
        (first, last), (start, end) = part.blocks, part.layers
        return (end - start) * (last - first) * self._runner.kv_block_bytes

    # --- receiving -------------------------------------------------------------------------------

    def _await(self, order: Order, num_parts: int) -> None:
        """Await the parts of an order, and no more those of requests that are gone or moved on."""
        self._awaited = {
            serial: each
            for serial, each in self._awaited.items()
            if each.key != order.key and self._lookup(each.key) is not None
        }
        if num_parts:
            self._awaited[order.serial] = _Awaited(order.key, num_parts)

    def _take_in(self, part: KvPart, packed: Packed) -> None:
        """Write a part into the cache, if its request is still there."""
        awaited, table = self._awaited.get(part.serial), self._lookup(part.key)
        if awaited is None or table is None:
            self._peers.discard(part.source, packed)
        elif self._write(part, packed, table[slice(*part.blocks)]):
            awaited.num_parts -= 1
        else:
            return
        self._tell_taken(part)
        if awaited is not None and awaited.num_parts == 0:
            del self._awaited[part.serial]
            self._landing.append(_Landing(part.key, mark(self._runner.device)))

    def _write(self, part: KvPart, packed: Packed, blocks: Sequence[int]) -> bool:
        """False where the link has just gone down: its group is about to break."""
        if part.runs:
            memory = self._peers.memory_of(part.source)
            if memory is None:
                return False
            read_kv(self._runner, blocks, *part.layers, memory, part.runs)
        else:
            try:
                with self._peers.received(part.source, packed) as received:
                    scatter_kv(self._runner, blocks, *part.layers, received)
            except LinkDownError:
                return False
        self.num_bytes += self._num_bytes(part)
        return True

    def _tell_taken(self, part: KvPart) -> None:
        """Say what was taken, but not too often while there is more."""
        self._taken[part.source] += self._num_bytes(part)
        if self._arrived and self._taken[part.source] < self._window_bytes / 4:
            return
        for source, num_bytes in self._taken.items():
            message = KvTaken(worker_id=self._peers.worker_id, num_bytes=num_bytes)
            self._peers.send(source, FrameKind.KV_TAKEN, message)
        self._taken.clear()
