"""Two ways for frames to get from a worker to a router: through NATS, and straight over TCP.

`benchmarks.bus` is the router's end and measures; `benchmarks.bus_peer` is the worker's end and
does what an order says: echo what comes, or send frames at a pace, each stamped with its send time.

    frame   | time.monotonic() as float64 | body |
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Awaitable, Callable
from typing import Literal, Protocol

from benchmarks.processes import ServerError
from shared.bus.base import Bus, BusMessage
from shared.wire import Message

ECHO_SUBJECT = "bench.echo"
ORDER_SUBJECT = "bench.order"
FRAME_SUBJECT = "bench.frames"

_STAMP = struct.Struct("<d")
_LENGTH = struct.Struct("<I")
_DEADLINE_SECONDS = 60.0


class Order(Message):
    """What the peer shall do. `per_second` 0 means as fast as it can."""

    kind: Literal["echo", "flood"] = "flood"
    count: int = 0
    per_second: float = 0.0
    body: bytes = b""


#: Called with the body and the time it took, in seconds, for each frame that arrives.
FrameHandler = Callable[[bytes, float], None]


class Link(Protocol):
    """The router's end of a connection to the peer."""

    async def echo(self, payload: bytes) -> None:
        """Send `payload` and wait until it has come back."""
        ...

    async def flood(self, order: Order, on_frame: FrameHandler) -> float:
        """Have the peer send frames; returns the seconds from the first to the last arrival.

        Raises ServerError where a frame is lost.
        """
        ...


async def send_frames(order: Order, send: Callable[[bytes], Awaitable[None]]) -> None:
    """The peer's part of a flood: `order.count` stamped frames at the ordered pace."""
    started_at = time.monotonic()
    for number in range(order.count):
        if order.per_second:
            due_at = started_at + number / order.per_second
            if (wait := due_at - time.monotonic()) > 0:
                await asyncio.sleep(wait)
        await send(_STAMP.pack(time.monotonic()) + order.body)


class ArrivalCounter:
    """Counts frames up to an expected number and remembers when the first and last came."""

    def __init__(self, expected: int, on_frame: FrameHandler) -> None:
        self._remaining = expected
        self._on_frame = on_frame
        self._first_at = 0.0
        self._last_at = 0.0
        self._complete = asyncio.Event()

    def take(self, frame: bytes) -> None:
        self._last_at = time.monotonic()
        self._first_at = self._first_at or self._last_at
        (sent_at,) = _STAMP.unpack_from(frame)
        self._on_frame(frame[_STAMP.size :], self._last_at - sent_at)
        self._remaining -= 1
        if self._remaining == 0:
            self._last_at = time.monotonic()
            self._complete.set()

    async def elapsed_seconds(self) -> float:
        """Wait for the last frame; raises ServerError where it does not come."""
        try:
            await asyncio.wait_for(self._complete.wait(), _DEADLINE_SECONDS)
        except TimeoutError as error:
            raise ServerError(f"{self._remaining} frames did not arrive") from error
        return self._last_at - self._first_at


class NatsLink:
    """Frames on a subject, as the services send them."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def echo(self, payload: bytes) -> None:
        await self._bus.request(ECHO_SUBJECT, payload, timeout_seconds=_DEADLINE_SECONDS)

    async def flood(self, order: Order, on_frame: FrameHandler) -> float:
        counter = ArrivalCounter(order.count, on_frame)

        async def take(message: BusMessage) -> None:
            counter.take(message.payload)

        subscription = await self._bus.subscribe(FRAME_SUBJECT, take)
        try:
            await self._bus.request(
                ORDER_SUBJECT, order.encode(), timeout_seconds=_DEADLINE_SECONDS
            )
            return await counter.elapsed_seconds()
        finally:
            await subscription.unsubscribe()


class TcpLink:
    """Frames with a length in front, one connection per order."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._echo_streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def echo(self, payload: bytes) -> None:
        if self._echo_streams is None:
            self._echo_streams = await self._open(Order(kind="echo"))
        reader, writer = self._echo_streams
        write_frame(writer, payload)
        await writer.drain()
        await read_frame(reader)

    async def flood(self, order: Order, on_frame: FrameHandler) -> float:
        counter = ArrivalCounter(order.count, on_frame)
        reader, writer = await self._open(order)
        for _ in range(order.count):
            counter.take(await read_frame(reader))
        writer.close()
        return await counter.elapsed_seconds()

    def close(self) -> None:
        """End the echo connection."""
        if self._echo_streams is not None:
            self._echo_streams[1].close()

    async def _open(self, order: Order) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        write_frame(writer, order.encode())
        return reader, writer


def write_frame(writer: asyncio.StreamWriter, payload: bytes) -> None:
    """Write one frame; the caller drains."""
    writer.write(_LENGTH.pack(len(payload)) + payload)


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """Read one frame; raises IncompleteReadError at the end of the stream."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return await reader.readexactly(length)
