"""The bus benchmark: why tokens may go over NATS, in numbers. `python -m benchmarks.bus`.

This process is the router's end, `benchmarks.bus_peer` the worker's, a real nats-server between
them. The same frames also go straight over TCP, the alternative that NATS must be compared with.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bus_links import Link, NatsLink, Order, TcpLink
from benchmarks.command import run_command
from benchmarks.machine import inspect_machine, measure_busy_share
from benchmarks.metrics import Distribution, distribution
from benchmarks.processes import ManagedProcess, ServerError, free_port
from benchmarks.report import Report, Table
from shared.bus.base import Bus, BusError
from shared.bus.nats import connect
from shared.embedded_nats import EmbeddedNats
from shared.messages import TokenFrame, TokenItem

_PACED_FRAMES_PER_SECOND = 500.0
_LOAD_FRAMES_PER_SECOND = 5000.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One row: the same thing measured through NATS and, where there is one, over TCP."""

    what: str
    nats: str
    tcp: str = ""


def token_frame(num_items: int) -> bytes:
    """An encoded frame of one engine step with one token for each of `num_items` requests."""
    items = tuple(
        TokenItem(
            request_id=f"cmpl-{number:032x}", attempt=0, index=number, token_ids=(40_000 + number,)
        )
        for number in range(num_items)
    )
    frame = TokenFrame(worker_id="worker-0", group_id="g0", epoch=1, step=1, items=items)
    return frame.encode()


async def frame_rate(link: Link, num_items: int, count: int, *, decode: bool) -> str:
    """Frames per second at full speed; with `decode` the receiver also parses every frame."""

    def on_frame(body: bytes, _: float) -> None:
        if decode:
            TokenFrame.decode(body)

    order = Order(count=count, body=token_frame(num_items))
    rate = (count - 1) / await link.flood(order, on_frame)
    return f"{rate:,.0f} ({rate * num_items:,.0f} tokens/s)"


async def one_way_latency(link: Link, num_items: int, count: int) -> str:
    """Time from publish to callback at an engine's pace."""
    delays: list[float] = []
    order = Order(count=count, per_second=_PACED_FRAMES_PER_SECOND, body=token_frame(num_items))
    await link.flood(order, lambda _, delay: delays.append(delay))
    return microseconds(distribution(delays))


async def round_trips(call: Callable[[], Awaitable[object]], count: int) -> str:
    """Time of `count` calls, one after the other."""
    times: list[float] = []
    for _ in range(count):
        started_at = time.monotonic()
        await call()
        times.append(time.monotonic() - started_at)
    return microseconds(distribution(times))


async def round_trips_under_load(link: Link, count: int) -> str:
    """Round trips while token frames flow towards us."""
    order = Order(
        count=int(_LOAD_FRAMES_PER_SECOND * 3),
        per_second=_LOAD_FRAMES_PER_SECOND,
        body=token_frame(32),
    )
    flood = asyncio.create_task(link.flood(order, lambda _, __: None))
    try:
        times = await round_trips(lambda: link.echo(bytes(200)), count)
    finally:
        await flood
    return times


def microseconds(sample: Distribution | None) -> str:
    """`p50 / p99` in microseconds."""
    if sample is None:
        raise ServerError("nothing was measured")
    return f"{sample.p50 * 1e6:,.0f} / {sample.p99 * 1e6:,.0f}"


async def measure_links(nats: Link, tcp: Link, scale: float) -> list[Finding]:
    """All rows that exist for both; `scale` shortens the run."""
    findings = []

    async def both(what: str, measure: Callable[[Link], Awaitable[str]]) -> None:
        findings.append(Finding(what, await measure(nats), await measure(tcp)))

    frames, calls = int(20_000 * scale), int(2000 * scale)
    size = len(token_frame(32))
    await both("frames/s, 1 token each", lambda link: frame_rate(link, 1, frames, decode=False))
    await both(
        f"frames/s, 32 tokens each ({size} bytes)",
        lambda link: frame_rate(link, 32, frames // 2, decode=False),
    )
    await both(
        "the same, every frame parsed by the receiver",
        lambda link: frame_rate(link, 32, frames // 2, decode=True),
    )
    await both(
        f"one way, {_PACED_FRAMES_PER_SECOND:.0f} frames/s of 32, p50 / p99 us",
        lambda link: one_way_latency(link, 32, calls),
    )
    await both(
        "request and reply of 200 bytes, p50 / p99 us",
        lambda link: round_trips(lambda: link.echo(bytes(200)), calls),
    )
    await both(
        f"the same while {_LOAD_FRAMES_PER_SECOND:,.0f} frames/s of 32 arrive",
        lambda link: round_trips_under_load(link, calls),
    )
    return findings


async def measure_key_value(bus: Bus, scale: float) -> list[Finding]:
    """Writing and reading a lease of 300 bytes."""
    bucket = await bus.key_value("bench", ttl_seconds=60.0)
    calls = int(1000 * scale)
    put = await round_trips(lambda: bucket.put("lease", bytes(300)), calls)
    get = await round_trips(lambda: bucket.get("lease"), calls)
    return [Finding("key-value put, p50 / p99 us", put), Finding("key-value get", get)]


async def wait_for_peer(link: Link, *, timeout_seconds: float = 20.0) -> None:
    """Return when the peer echoes."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            await link.echo(b"up?")
            return
        except (BusError, OSError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)


def render(findings: Sequence[Finding]) -> str:
    rows = [[finding.what, finding.nats, finding.tcp or "-"] for finding in findings]
    return Table(("", "NATS", "direct TCP"), rows).render()


async def run(options: argparse.Namespace) -> None:
    report = Report("Bus benchmark")
    machine = inspect_machine()
    busy = await measure_busy_share()
    report.add(f"{machine.describe()}, busy before: {busy:.0%}")
    port = free_port()
    async with EmbeddedNats() as nats_server:
        url = nats_server.url
        command = [sys.executable, "-m", "benchmarks.bus_peer", "--nats", url]
        command += ["--tcp-port", str(port)]
        async with ManagedProcess(command, log_path=options.out.parent / "logs" / "bus-peer.log"):
            bus = await connect(url, service="bench", instance="router")
            nats, tcp = NatsLink(bus), TcpLink(port)
            try:
                await wait_for_peer(nats)
                findings = await measure_links(nats, tcp, options.scale)
                findings += await measure_key_value(bus, options.scale)
            finally:
                tcp.close()
                await bus.close()
    report.add(render(findings))
    data = {
        "machine": dataclasses.asdict(machine),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    report.save(options.out, data)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bus", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="length of the run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bus"))
    return run_command(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
