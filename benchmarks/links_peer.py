"""The far end of the links benchmark, a process of its own. Started by `benchmarks.links`.

Both ends read CLOCK_MONOTONIC, which is one clock for the machine, so the time of a frame's
arrival can be compared with the time it was sent.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from enum import IntEnum

import msgpack
import torch

from benchmarks.command import run_command
from services.worker.channels.factory import ChannelFactory
from services.worker.links.base import DownReason, Link, LinkClass, LinkFrame, Transport
from services.worker.links.config import LinkConfig
from services.worker.links.context import EndpointAddress, LinkContext, LinkHandlers
from services.worker.links.endpoint import LinkEndpoint
from services.worker.links.host import host_id
from services.worker.links.link import StreamLink
from shared.bus.base import Bus
from shared.bus.nats import connect
from shared.subjects import Subjects

SUBJECTS = Subjects("bench")
FAR, NEAR = "far", "near"


class Kind(IntEnum):
    """What the near end wants."""

    PROBE = 1  # answer with the time of arrival
    BULK = 2  # count
    ANSWER = 3


def make_context(
    worker_id: str,
    bus: Bus,
    config: LinkConfig,
    handlers: LinkHandlers,
    transports: tuple[Transport, ...] = tuple(Transport),
) -> LinkContext:
    """A worker on this host that uses `transports`."""
    address = EndpointAddress("127.0.0.1", "", host_id(), transports)
    channels = ChannelFactory.through_host(torch.device("cpu"))
    return LinkContext(
        worker_id, bus, SUBJECTS, address, config, handlers, channels, lambda: (1, 1)
    )


def answer(link: Link, frame: LinkFrame) -> None:
    """Tell when a probe arrived. Of bulk the last frame is a probe of its class."""
    if frame.kind == Kind.PROBE:
        arrived_at = msgpack.packb(time.monotonic())
        link.send(LinkFrame(Kind.ANSWER, "bench", 1, arrived_at), LinkClass.CONTROL)


async def serve(nats_url: str) -> None:
    """Accept links until cancelled; one at a time is used."""
    links: list[StreamLink] = []
    bus = await connect(nats_url, service="bench", instance=FAR)

    def ignore(link: Link, reason: DownReason) -> None:
        return

    handlers = LinkHandlers(links.append, answer, ignore)
    endpoint = LinkEndpoint(make_context(FAR, bus, LinkConfig(), handlers))
    try:
        await endpoint.start()
        await asyncio.Event().wait()
    finally:
        await endpoint.close()
        for link in links:
            link.close()
        await bus.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.links_peer", description=__doc__)
    parser.add_argument("--nats", required=True)
    return run_command(serve(parser.parse_args().nats))


if __name__ == "__main__":
    sys.exit(main())
