"""Carries requests' KV between the members of a group, as the leader orders. Engine thread.

    order seen by all members --> source: gather, send     destination: room made, parts awaited
                                             \\--KvPart------------> scatter, last one: filled

A request's KV travels in parts of a few layers each, gathered one by one between two batches: the
link sends one while the next is gathered, and small buffers are used again where large ones would
be new pages each time. Orders come down the chain and parts come directly, so a part may be early;
then it waits. A part whose request is gone is discarded.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.worker.engine.request import KvKey
from services.worker.links.base import Buffer, LinkClass
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.kv_transfer import as_buffer, gather_kv, layer_parts, scatter_kv
from services.worker.pipeline.messages import FrameKind, KvPart, Order
from services.worker.pipeline.peers import GroupPeers
from services.worker.work_pacer import WorkPacer

#: The blocks of a key on this worker, in token order; None if it has none (any more).
TableLookup = Callable[[KvKey], Sequence[int] | None]

#: Share of the time that sending may take while batches run: requests stand still meanwhile.
_SHARE = 0.25


@dataclass(slots=True)
class _Awaited:
    """An order that this worker gets KV by."""

    key: KvKey
    num_parts: int  # that have not come


class KvCourier:
    """One member's side of all exchanges of a group.

    Attributes:
        num_bytes: of KV sent and received so far.
        began_at: when the first order came, on the clock of `time.perf_counter`.
    """

    def __init__(self, peers: GroupPeers, runner: ModelRunner, lookup: TableLookup) -> None:
        self.num_bytes = 0
        self.began_at: float | None = None
        self._peers = peers
        self._runner = runner
        self._lookup = lookup
        self._serial = 0
        self._awaited: dict[int, _Awaited] = {}  # by serial
        self._early: list[tuple[KvPart, Buffer]] = []
        self._outgoing: dict[str, deque[KvPart]] = {}  # by destination
        self._pacer = WorkPacer(time.perf_counter(), _SHARE, runner.activity)

    def obey(self, order: Order) -> list[KvKey]:
        """Note what to send, and what will come; room for that has been made.

        Returns:
            Keys all of whose parts are here, because they were early.

        Raises:
            KeyError: this worker has nothing of a request whose KV it shall send.
        """
        self._serial = order.serial
        self.began_at = self.began_at or time.perf_counter()
        here = self._peers.worker_id
        num_awaited = 0
        for transfer in order.transfers:
            parts = self._parts(order, transfer.start, transfer.end)
            if transfer.destination == here:
                num_awaited += len(parts)
            elif transfer.source == here:
                if self._lookup(order.key) is None:
                    raise KeyError(f"no KV of request {order.key.request_id} is here")
                self._outgoing.setdefault(transfer.destination, deque()).extend(parts)
        if num_awaited:
            self._forget_gone()
            self._awaited[order.serial] = _Awaited(order.key, num_awaited)
        early, self._early = self._early, []
        return [key for part, buffer in early for key in self.take(part, buffer)]

    def take(self, part: KvPart, buffer: Buffer) -> list[KvKey]:
        """Write a part into the cache; returns its key if it was the last one awaited."""
        if part.serial > self._serial:
            self._early.append((part, buffer))
            return []
        awaited, table = self._awaited.get(part.serial), self._lookup(part.key)
        if awaited is None or table is None:
            return []
        self.num_bytes += len(buffer)
        scatter_kv(self._runner, self._covering(table, part), part.start, part.end, buffer)
        awaited.num_parts -= 1
        if awaited.num_parts:
            return []
        del self._awaited[part.serial]
        return [part.key]

    @property
    def is_busy(self) -> bool:
        """True while `pump` has something to send."""
        return any(self._outgoing.values())

    def pump(self) -> None:
        """Gather and send for as long as it may take now, and as long as the links take it."""
        if not self.is_busy:
            return
        now = time.perf_counter()
        ends_at = now + self._pacer.grant(now)
        for destination, parts in self._outgoing.items():
            while parts and now < ends_at and not self._is_clogged(destination):
                self._send(destination, parts.popleft())
                now = time.perf_counter()
        self._pacer.used(now)

    def _send(self, destination: str, part: KvPart) -> None:
        table = self._lookup(part.key)
        if table is None:  # nobody wants it any more
            return
        gathered = gather_kv(self._runner, self._covering(table, part), part.start, part.end)
        self.num_bytes += gathered.nbytes
        self._peers.send_bulk(
            destination, LinkClass.EXCHANGE, FrameKind.KV_PART, part, as_buffer(gathered)
        )

    def _is_clogged(self, destination: str) -> bool:
        return self._peers.is_clogged(destination, LinkClass.EXCHANGE)

    def _parts(self, order: Order, start: int, end: int) -> list[KvPart]:
        """The parts of a transfer; the same at both ends."""
        num_blocks = -(-order.num_tokens // self._runner.block_size)
        return [
            KvPart(
                serial=order.serial,
                key=order.key,
                num_tokens=order.num_tokens,
                start=first,
                end=last,
            )
            for first, last in layer_parts(start, end, num_blocks * self._runner.kv_block_bytes)
        ]

    def _forget_gone(self) -> None:
        """Await nothing more for requests that are gone: their parts may never come."""
        gone = [serial for serial, each in self._awaited.items() if not self._lookup(each.key)]
        for serial in gone:
            del self._awaited[serial]

    def _covering(self, table: Sequence[int], part: KvPart) -> Sequence[int]:
        return table[: -(-part.num_tokens // self._runner.block_size)]
