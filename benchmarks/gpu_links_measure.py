"""What `benchmarks.gpu_links` measures on one open link, and what the other end does about it.

near   gather --> slot, ticket ------> far   slot --> scatter, and at the end an answer
near   hidden --> slot, ticket ------> far   slot, in place --> slot, ticket ------> near
"""

from __future__ import annotations

import functools
import queue
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from services.worker.channels.base import Packed
from services.worker.kernels.ops import LayerOps
from services.worker.links.base import DownReason, Link, LinkClass, LinkFrame

DEADLINE_SECONDS = 60.0
#: KV of a part: of so many layers, the blocks of so many tokens.
NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE = 8, 256, 16
_POLL_SECONDS = 0.0001


class Kind(IntEnum):
    """What the near end wants."""

    PART = 1  # scatter it
    HIDDEN = 2  # send it back
    END = 3  # answer when everything is done
    ANSWER = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """What travels.

    Args:
        block_bytes: one KV block of one layer.
        part_blocks: blocks of one layer in a part; it has all layers.
        hidden_bytes: one token's hidden state.
    """

    block_bytes: int
    part_blocks: int
    hidden_bytes: int


@dataclass(frozen=True, slots=True)
class ExchangeFinding:
    """Parts from cache to cache, one after the other."""

    channel: str
    num_bytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        return self.num_bytes / self.seconds


@dataclass(frozen=True, slots=True)
class ActivationFinding:
    """Half of the time there and back, until the device has it."""

    channel: str
    num_tokens: int
    seconds: float


class End:
    """One side: a link, caches of KV, and what came."""

    def __init__(self, device: torch.device, ops: LayerOps, shape: Shape) -> None:
        self.shape = shape
        self._device = device
        self._ops = ops
        self._inbox: queue.SimpleQueue[LinkFrame | None] = queue.SimpleQueue()
        size = NUM_BLOCKS * shape.block_bytes
        self._caches = [
            torch.zeros(size, dtype=torch.uint8, device=device).view(NUM_BLOCKS, -1)
            for _ in range(NUM_LAYERS)
        ]

    def on_frame(self, link: Link, frame: LinkFrame) -> None:
        self._inbox.put(frame)

    def on_down(self, link: Link, reason: DownReason) -> None:
        self._inbox.put(None)

    def serve(self, link: Link) -> None:
        """Do what the other end wants until the link is down."""
        while (frame := self._inbox.get(timeout=DEADLINE_SECONDS)) is not None:
            match frame.kind:
                case Kind.PART:
                    with link.channel.received(frame.buffers) as part:
                        self._ops.scatter_blocks(self._caches, self._table, part)
                case Kind.HIDDEN:
                    with link.channel.received(frame.buffers) as hidden:
                        packed = link.channel.pack(hidden, LinkClass.CONTROL)
                    self._send(link, LinkClass.CONTROL, Kind.HIDDEN, packed)
                case Kind.END:
                    self._synchronize()
                    self._send(link, LinkClass.CONTROL, Kind.ANSWER)

    def exchange(self, link: Link, num_parts: int) -> ExchangeFinding:
        """Send so many parts and wait until they are written over there."""
        nbytes = NUM_LAYERS * self.shape.part_blocks * self.shape.block_bytes
        gather = functools.partial(self._ops.gather_blocks, self._caches, self._table)
        self._synchronize()
        began_at = time.perf_counter()
        for _ in range(num_parts):
            self._wait_for_room(link)
            packed = link.channel.put(nbytes, LinkClass.EXCHANGE, gather)
            self._send(link, LinkClass.EXCHANGE, Kind.PART, packed)
        self._send(link, LinkClass.EXCHANGE, Kind.END)  # behind the parts
        self._receive()
        seconds = time.perf_counter() - began_at
        return ExchangeFinding(link.channel.kind.value, num_parts * nbytes, seconds)

    def activation(self, link: Link, num_tokens: int, repetitions: int) -> ActivationFinding:
        """Send hidden states there and back."""
        size = num_tokens * self.shape.hidden_bytes
        hidden = torch.zeros(size, dtype=torch.uint8, device=self._device)
        times = [self._seconds_there_and_back(link, hidden) for _ in range(repetitions)]
        return ActivationFinding(link.channel.kind.value, num_tokens, statistics.median(times) / 2)

    def _seconds_there_and_back(self, link: Link, hidden: torch.Tensor) -> float:
        self._synchronize()
        began_at = time.perf_counter()
        packed = link.channel.pack(hidden, LinkClass.CONTROL)
        self._send(link, LinkClass.CONTROL, Kind.HIDDEN, packed)
        with link.channel.received(self._receive().buffers) as received:
            hidden.copy_(received)
        self._synchronize()
        return time.perf_counter() - began_at

    @property
    def _table(self) -> Sequence[int]:
        """Blocks that do not lie side by side."""
        return range(0, 2 * self.shape.part_blocks, 2)

    def _wait_for_room(self, link: Link) -> None:
        ends_at = time.monotonic() + DEADLINE_SECONDS
        while not link.channel.has_room(LinkClass.EXCHANGE):
            if time.monotonic() > ends_at:
                raise ConnectionError("the other end takes nothing")
            time.sleep(_POLL_SECONDS)

    def _send(self, link: Link, link_class: LinkClass, kind: Kind, packed: Packed = ()) -> None:
        while not link.send(LinkFrame(kind, "bench", 1, b"", packed), link_class):
            if not link.wait_writable(link_class, DEADLINE_SECONDS):
                raise ConnectionError("the other end takes nothing")

    def _receive(self) -> LinkFrame:
        frame = self._inbox.get(timeout=DEADLINE_SECONDS)
        if frame is None:
            raise ConnectionError("the other end is gone")
        return frame

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
