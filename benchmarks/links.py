"""The links benchmark: what activations and exchanges get. `python -m benchmarks.links`.

This process and `benchmarks.links_peer` are two workers on one host; their links are opened as in
production, over a real nats-server. The bound is the rate of a plain copy in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from benchmarks.command import run_command
from benchmarks.links_measure import (
    DEADLINE_SECONDS,
    KIB,
    FrameFinding,
    LoadFinding,
    Near,
    measure_frames,
    measure_load,
    memory_copy_rate,
)
from benchmarks.links_peer import FAR, NEAR, make_context
from benchmarks.machine import inspect_machine, measure_busy_share
from benchmarks.processes import ManagedProcess
from benchmarks.report import Report, Table
from services.worker.links.base import LinkError, LinkPeer, Transport
from services.worker.links.config import LinkConfig
from services.worker.links.context import LinkHandlers
from services.worker.links.endpoint import LinkEndpoint
from services.worker.links.link import StreamLink
from shared.bus.base import Bus
from shared.bus.nats import connect
from shared.embedded_nats import EmbeddedNats
from shared.settings import ByteSize

Measured = TypeVar("Measured")


def render_frames(findings: Sequence[FrameFinding], copy_rate: float) -> str:
    rows = [
        [
            f"{finding.transport} {finding.frame_bytes // KIB} KiB",
            f"{finding.latency.p50 * 1e6:.0f}",
            f"{finding.latency.p99 * 1e6:.0f}",
            f"{finding.bytes_per_second / 1e9:.2f}",
            f"{finding.bytes_per_second / copy_rate:.0%}",
        ]
        for finding in findings
    ]
    headers = ("frame", "latency p50 us", "p99 us", "bandwidth GB/s", "of a memory copy")
    return Table(headers, rows).render()


def render_load(findings: Sequence[LoadFinding]) -> str:
    rows = [
        [
            finding.transport
            + (f", {finding.bandwidth_limit / 1e6:g} MB/s" if finding.bandwidth_limit else ""),
            f"{finding.latency.p50 * 1e3:.2f}",
            f"{finding.latency.p99 * 1e3:.2f}",
            f"{finding.latency.max * 1e3:.2f}",
            f"{finding.chunk_bytes // KIB}",
            f"{finding.bound_seconds * 1e3:.2f}",
            f"{finding.exchange_bytes_per_second / 1e6:.1f}",
            f"{finding.activation_bytes_per_second / 1e6:.1f}",
            f"{finding.used:.0%}",
        ]
        for finding in findings
    ]
    headers = (
        "activation of 74 KiB behind an exchange",
        "p50 ms",
        "p99 ms",
        "max ms",
        "chunk KiB",
        "chunk + own ms",
        "exchange MB/s",
        "activations MB/s",
        "both, of idle",
    )
    return Table(headers, rows).render()


async def with_link(
    bus: Bus,
    transport: Transport,
    config: LinkConfig,
    measure: Callable[[Near, StreamLink], Measured],
) -> Measured:
    """Open a link, measure on a thread, close it."""
    near = Near()
    handlers = LinkHandlers(lambda link: None, near.on_frame, near.on_down)
    context = make_context(NEAR, bus, config, handlers, (transport,))
    peer = LinkPeer(FAR, "bench", 1, 1)
    link = await LinkEndpoint(context).open(peer, timeout_seconds=DEADLINE_SECONDS)
    try:
        return await asyncio.to_thread(measure, near, link)
    finally:
        await asyncio.to_thread(link.close)


async def measure_all(
    bus: Bus, options: argparse.Namespace
) -> tuple[list[FrameFinding], list[LoadFinding]]:
    """Every transport, without a limit and with the one that was asked for."""
    frames: list[FrameFinding] = []
    loads: list[LoadFinding] = []
    for transport in Transport:
        by_size = functools.partial(measure_frames, scale=options.scale)
        frames += await with_link(bus, transport, LinkConfig(), by_size)
        for limit in (None, float(options.link_bandwidth)):
            config = LinkConfig(bandwidth_bytes_per_second=limit)
            load = functools.partial(measure_load, limit=limit, seconds=5.0 * options.scale)
            loads.append(await with_link(bus, transport, config, load))
    return frames, loads


async def wait_for_peer(bus: Bus) -> None:
    """Return when the far end takes offers."""
    ends_at = time.monotonic() + DEADLINE_SECONDS
    while True:
        try:
            await with_link(bus, Transport.TCP, LinkConfig(), lambda near, link: None)
            return
        except LinkError:
            if time.monotonic() > ends_at:
                raise
            await asyncio.sleep(0.1)


async def run(options: argparse.Namespace) -> None:
    report = Report("Links benchmark")
    machine = inspect_machine()
    busy = await measure_busy_share()
    copy_rate = memory_copy_rate()
    report.add(f"{machine.describe()}, busy before: {busy:.0%}")
    report.add(f"A copy in memory: {copy_rate / 1e9:.1f} GB/s")
    async with EmbeddedNats() as nats_server:
        command = [sys.executable, "-m", "benchmarks.links_peer", "--nats", nats_server.url]
        log_path = options.out.parent / "logs" / "links-peer.log"
        async with ManagedProcess(command, log_path=log_path):
            bus = await connect(nats_server.url, service="bench", instance=NEAR)
            try:
                await wait_for_peer(bus)
                frames, loads = await measure_all(bus, options)
            finally:
                await bus.close()
    report.add(render_frames(frames, copy_rate))
    report.add(render_load(loads))
    data = {
        "machine": dataclasses.asdict(machine),
        "memory_copy_bytes_per_second": copy_rate,
        "frames": [dataclasses.asdict(finding) for finding in frames],
        "loads": [dataclasses.asdict(finding) for finding in loads],
    }
    report.save(options.out, data)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.links", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="length of the run")
    parser.add_argument(
        "--link-bandwidth",
        type=TypeAdapter(ByteSize).validate_python,
        default="10MB",
        help="limit for the second part, per second",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/links"))
    return run_command(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
