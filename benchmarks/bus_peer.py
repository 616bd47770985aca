"""The worker's end of the bus benchmark, a process of its own. Started by `benchmarks.bus`."""

from __future__ import annotations

import argparse
import asyncio
import sys

from benchmarks.bus_links import (
    ECHO_SUBJECT,
    FRAME_SUBJECT,
    ORDER_SUBJECT,
    Order,
    read_frame,
    send_frames,
    write_frame,
)
from benchmarks.command import run_command
from shared.bus.base import Bus, BusMessage
from shared.bus.nats import connect


class NatsPeer:
    """Echoes, and runs one flood at a time in a task of its own."""

    def __init__(self, bus: Bus, tasks: asyncio.TaskGroup) -> None:
        self._bus = bus
        self._tasks = tasks

    async def start(self) -> None:
        """Subscribe; the echo last, so that who hears it can give orders."""
        await self._bus.subscribe(ORDER_SUBJECT, self._on_order)
        await self._bus.subscribe(ECHO_SUBJECT, self._on_echo)

    async def _on_echo(self, message: BusMessage) -> None:
        await self._bus.publish(message.reply, message.payload)

    async def _on_order(self, message: BusMessage) -> None:
        order = Order.decode(message.payload)
        await self._bus.publish(message.reply, b"")
        self._tasks.create_task(send_frames(order, self._send))

    async def _send(self, frame: bytes) -> None:
        await self._bus.publish(FRAME_SUBJECT, frame)


async def serve_tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One TCP connection: an order, then what it says until it is done or the client is gone."""

    async def send(frame: bytes) -> None:
        write_frame(writer, frame)
        await writer.drain()

    try:
        order = Order.decode(await read_frame(reader))
        if order.kind == "flood":
            await send_frames(order, send)
        while order.kind == "echo":
            await send(await read_frame(reader))
    except (asyncio.IncompleteReadError, ConnectionError):
        return
    finally:
        writer.close()


async def run(options: argparse.Namespace) -> None:
    bus = await connect(options.nats, service="bench", instance="peer")
    server = await asyncio.start_server(serve_tcp, "127.0.0.1", options.tcp_port)
    try:
        async with asyncio.TaskGroup() as tasks:
            await NatsPeer(bus, tasks).start()
            await server.serve_forever()
    finally:
        await bus.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bus_peer", description=__doc__)
    parser.add_argument("--nats", required=True)
    parser.add_argument("--tcp-port", type=int, required=True)
    return run_command(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
