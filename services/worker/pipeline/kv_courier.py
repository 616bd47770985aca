"""Carries requests' KV between the members of a group, as the leader orders. Engine thread.

    order seen by all members --> source: gather, send     destination: room made, parts awaited
                                             \\--KvPart------------> scatter, last one: filled

Orders come down the chain and parts come directly, so a part may be early; then it waits. A part
whose request is gone is discarded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from services.worker.engine.request import KvKey
from services.worker.links.base import Buffer
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.kv_transfer import as_buffer, gather_kv, scatter_kv
from services.worker.pipeline.messages import FrameKind, KvPart, Order
from services.worker.pipeline.peers import GroupPeers

#: The blocks of a key on this worker, in token order; None if it has none (any more).
TableLookup = Callable[[KvKey], Sequence[int] | None]


class KvCourier:
    """One member's side of all exchanges of a group.

    Attributes:
        num_bytes: of KV sent and received so far.
        began_at: when the first order came, on the clock of `time.perf_counter`.
    """

    def __init__(self, peers: GroupPeers, runner: ModelRunner, lookup: TableLookup) -> None:
        self._peers = peers
        self._runner = runner
        self._lookup = lookup
        self.num_bytes = 0
        self.began_at: float | None = None
        self._serial = 0
        self._num_awaited: dict[int, int] = {}  # parts, by serial
        self._early: list[tuple[KvPart, Buffer]] = []

    def obey(self, order: Order) -> list[KvKey]:
        """Send what this worker shall send; room for what it shall get has been made.

        Returns:
            Keys all of whose parts are here, because they were early.

        Raises:
            KeyError: this worker has nothing of that request.
        """
        self._serial = order.serial
        self.began_at = self.began_at or time.perf_counter()
        here = self._peers.worker_id
        num_awaited = sum(transfer.destination == here for transfer in order.transfers)
        if num_awaited:
            self._num_awaited[order.serial] = num_awaited
        for transfer in order.transfers:
            if transfer.source == here:
                self._send(order, transfer.destination, transfer.start, transfer.end)
        early, self._early = self._early, []
        return [key for part, buffer in early for key in self.take(part, buffer)]

    def take(self, part: KvPart, buffer: Buffer) -> list[KvKey]:
        """Write a part into the cache; returns its key if it was the last one awaited."""
        if part.serial > self._serial:
            self._early.append((part, buffer))
            return []
        self._num_awaited[part.serial] -= 1
        is_last = self._num_awaited[part.serial] == 0
        if is_last:
            del self._num_awaited[part.serial]
        table = self._lookup(part.key)
        if table is None:
            return []
        self.num_bytes += len(buffer)
        scatter_kv(self._runner, self._covering(table, part), part.start, part.end, buffer)
        return [part.key] if is_last else []

    def _send(self, order: Order, destination: str, start: int, end: int) -> None:
        table = self._lookup(order.key)
        if table is None:
            raise KeyError(f"no KV of request {order.key.request_id} is here")
        part = KvPart(
            serial=order.serial,
            key=order.key,
            num_tokens=order.num_tokens,
            start=start,
            end=end,
        )
        gathered = gather_kv(self._runner, self._covering(table, part), start, end)
        self.num_bytes += gathered.nbytes
        self._peers.send_bulk(destination, FrameKind.KV_PART, part, as_buffer(gathered))

    def _covering(self, table: Sequence[int], part: KvPart) -> Sequence[int]:
        return table[: -(-part.num_tokens // self._runner.block_size)]
