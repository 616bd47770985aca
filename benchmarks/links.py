"""The links benchmark: what activations and exchanges get. `python -m benchmarks.links`.

This process and `benchmarks.links_peer` are two workers on one host; their links are opened as in
production, over a real nats-server. The bound is the rate of a plain copy in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgpack
import numpy as np
from pydantic import TypeAdapter

from benchmarks.command import run_command
from benchmarks.links_peer import FAR, NEAR, Kind, make_context
from benchmarks.machine import inspect_machine, measure_busy_share
from benchmarks.metrics import Distribution, distribution
from benchmarks.processes import ManagedProcess
from benchmarks.report import Report, Table
from services.worker.links.base import (
    DownReason,
    Link,
    LinkClass,
    LinkError,
    LinkFrame,
    LinkPeer,
    Transport,
)
from services.worker.links.config import LinkConfig
from services.worker.links.context import LinkHandlers
from services.worker.links.endpoint import LinkEndpoint
from services.worker.links.link import StreamLink
from shared.bus.base import Bus
from shared.bus.nats import connect
from shared.embedded_nats import EmbeddedNats
from shared.settings import ByteSize

KIB, MIB = 1024, 1024 * 1024
#: A decode step of 32 rows, a chunk of prefill, and KV of an exchange among them.
FRAME_BYTES = (4 * KIB, 74 * KIB, 600 * KIB, 8 * MIB)
ACTIVATION_BYTES = 74 * KIB
EXCHANGE_FRAME_BYTES = 2 * MIB
DEADLINE_SECONDS = 60.0
#: Probes behind an exchange come at the rate of pipelined decode steps.
PROBE_INTERVAL_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class FrameFinding:
    """One frame size on one transport."""

    transport: str
    frame_bytes: int
    latency: Distribution
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class LoadFinding:
    """Activations while an exchange takes all the bandwidth that they leave."""

    transport: str
    bandwidth_limit: float | None
    latency: Distribution
    exchange_bytes_per_second: float
    activation_bytes_per_second: float
    idle_bytes_per_second: float
    chunk_bytes: int

    @property
    def name(self) -> str:
        if self.bandwidth_limit is None:
            return self.transport
        return f"{self.transport}, {self.bandwidth_limit / 1e6:g} MB/s"

    @property
    def used(self) -> float:
        """Share of the idle link's bandwidth that exchange and activations got together."""
        total = self.exchange_bytes_per_second + self.activation_bytes_per_second
        return total / self.idle_bytes_per_second

    @property
    def bound_seconds(self) -> float:
        """One chunk in front and the activation itself, at the bandwidth of the idle link."""
        return (self.chunk_bytes + ACTIVATION_BYTES) / self.idle_bytes_per_second


class Near:
    """The measuring end of a link."""

    def __init__(self) -> None:
        self._answers: queue.Queue[float] = queue.Queue()

    def on_frame(self, link: Link, frame: LinkFrame) -> None:
        if frame.kind == Kind.ANSWER:
            self._answers.put(msgpack.unpackb(frame.header))

    def on_down(self, link: Link, reason: DownReason) -> None:
        self._answers.put(float("nan"))

    def probe(self, link: Link, data: memoryview, link_class: LinkClass) -> float:
        """Send a frame; returns the seconds until it had arrived whole."""
        sent_at = time.monotonic()
        send(link, LinkFrame(Kind.PROBE, "bench", 1, b"", [data]), link_class)
        arrived_at = self._answers.get(timeout=DEADLINE_SECONDS)
        if arrived_at != arrived_at:
            raise LinkError("the link went down during the measurement")
        return arrived_at - sent_at


def send(link: Link, frame: LinkFrame, link_class: LinkClass) -> None:
    """Send, waiting for room."""
    while not link.send(frame, link_class):
        if not link.wait_writable(link_class, DEADLINE_SECONDS):
            raise LinkError("no room on the link")


def summarise(seconds: Sequence[float]) -> Distribution:
    """The distribution of a sample that is not empty."""
    found = distribution(seconds)
    if found is None:
        raise LinkError("nothing was measured")
    return found


def memory_copy_rate() -> float:
    """Bytes per second of a copy between arrays larger than the caches; the best of some."""
    source, target = (np.ones(64 * MIB, dtype=np.uint8) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        began_at = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - began_at)
    return source.nbytes / best


def measure_frames(near: Near, link: StreamLink, scale: float) -> list[FrameFinding]:
    """Latency of single CONTROL frames and bandwidth of EXCHANGE frames, by size."""
    findings = []
    for frame_bytes in FRAME_BYTES:
        data = np.ones(frame_bytes, dtype=np.uint8).data
        count = max(20, round(scale * min(2000, 400 * MIB / frame_bytes)))
        latencies = [near.probe(link, data, LinkClass.CONTROL) for _ in range(count)]
        rate = measure_bandwidth(near, link, data, round(scale * 512 * MIB))
        finding = FrameFinding(
            link.transport.value, frame_bytes, summarise(latencies[count // 10 :]), rate
        )
        findings.append(finding)
    return findings


def measure_bandwidth(near: Near, link: Link, data: memoryview, total_bytes: int) -> float:
    """Bytes per second of EXCHANGE frames until the last of them has arrived."""
    count = max(4, min(20_000, total_bytes // len(data)))
    frame = LinkFrame(Kind.BULK, "bench", 1, b"", [data])
    began_at = time.perf_counter()
    for _ in range(count - 1):
        send(link, frame, LinkClass.EXCHANGE)
    near.probe(link, data, LinkClass.EXCHANGE)
    return count * len(data) / (time.perf_counter() - began_at)


def measure_load(near: Near, link: StreamLink, limit: float | None, seconds: float) -> LoadFinding:
    """Activations at a steady pace while another thread keeps the exchange queue full."""
    bulk = np.ones(EXCHANGE_FRAME_BYTES, dtype=np.uint8).data
    activation = np.ones(ACTIVATION_BYTES, dtype=np.uint8).data
    idle_total = 256 * MIB if limit is None else round(limit * seconds / 2)
    idle_rate = measure_bandwidth(near, link, bulk, idle_total)
    over = threading.Event()

    def saturate() -> None:
        frame = LinkFrame(Kind.BULK, "bench", 1, b"", [bulk])
        while not over.is_set():
            if not link.send(frame, LinkClass.EXCHANGE):
                link.wait_writable(LinkClass.EXCHANGE, 0.1)

    flood = threading.Thread(target=saturate)
    flood.start()
    before, began_at = link.stats(), time.monotonic()
    latencies = []
    while time.monotonic() < began_at + seconds:
        latencies.append(near.probe(link, activation, LinkClass.CONTROL))
        time.sleep(PROBE_INTERVAL_SECONDS)
    after, took = link.stats(), time.monotonic() - began_at
    over.set()
    flood.join()
    exchange = LinkClass.EXCHANGE
    moved = after.classes[exchange].bytes_sent - before.classes[exchange].bytes_sent
    activations = len(latencies) * ACTIVATION_BYTES / took
    return LoadFinding(
        link.transport.value,
        limit,
        summarise(latencies),
        moved / took,
        activations,
        idle_rate,
        after.chunk_bytes,
    )


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
    bus: Bus, transport: Transport, config: LinkConfig, measure: Callable[[Near, StreamLink], None]
) -> None:
    """Open a link, measure on a thread, close it."""
    near = Near()
    handlers = LinkHandlers(lambda link: None, near.on_frame, near.on_down)
    context = make_context(NEAR, bus, config, handlers, (transport,))
    peer = LinkPeer(FAR, "bench", 1, 1)
    link = await LinkEndpoint(context).open(peer, timeout_seconds=DEADLINE_SECONDS)
    try:
        await asyncio.to_thread(measure, near, link)
    finally:
        await asyncio.to_thread(link.close)


async def measure_all(
    bus: Bus, options: argparse.Namespace
) -> tuple[list[FrameFinding], list[LoadFinding]]:
    """Every transport, without a limit and with the one that was asked for."""
    frames: list[FrameFinding] = []
    loads: list[LoadFinding] = []
    seconds = 5.0 * options.scale
    for transport in Transport:
        await with_link(
            bus,
            transport,
            LinkConfig(),
            lambda near, link: frames.extend(measure_frames(near, link, options.scale)),
        )
        for limit in (None, float(options.link_bandwidth)):
            await with_link(
                bus,
                transport,
                LinkConfig(bandwidth_bytes_per_second=limit),
                lambda near, link, limit=limit: loads.append(  # type: ignore[misc]
                    measure_load(near, link, limit, seconds)
                ),
            )
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
