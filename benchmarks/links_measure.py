"""What the links benchmark measures on one open link; blocking, meant for a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgpack
import numpy as np

from benchmarks.links_peer import Kind
from benchmarks.metrics import Distribution, distribution
from services.worker.links.base import DownReason, Link, LinkClass, LinkError, LinkFrame
from services.worker.links.link import StreamLink

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
