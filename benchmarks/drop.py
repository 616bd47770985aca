"""The drop benchmark: everything that moves bytes. `python -m benchmarks.drop`, below 3 minutes.

Memory alone, links alone, then two real workers that drop and restore under load. Each table begins
with the limit, which is bytes over a bandwidth measured here.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import run_command
from benchmarks.drop_cluster import WORKERS, drop_cluster
from benchmarks.drop_measure import (
    SOURCES,
    DropFinding,
    TransferFinding,
    measure_drop,
    measure_transfer,
)
from benchmarks.drop_memory import MIB, NUM_BYTES, MemoryFinding, measure_memory
from benchmarks.links import wait_for_peer, with_link
from benchmarks.links_measure import (
    EXCHANGE_FRAME_BYTES,
    LoadFinding,
    Near,
    measure_bandwidth,
    measure_load,
    memory_copy_rate,
)
from benchmarks.links_peer import NEAR
from benchmarks.machine import inspect_machine, measure_busy_share
from benchmarks.metrics import percentile
from benchmarks.processes import ManagedProcess
from benchmarks.report import Report, Table
from services.worker.links.base import Transport
from services.worker.links.config import LinkConfig
from services.worker.links.link import StreamLink
from shared.bus.nats import connect
from shared.embedded_nats import EmbeddedNats

_WORKER_ARGUMENTS = ("--device-memory", "640MiB", "--threads", "1")
_LINK_SECONDS = 2.0


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def render_memory(finding: MemoryFinding, copy_rate: float) -> str:
    rows = [
        ["copying them (not done), at the memory's speed", milliseconds(NUM_BYTES / copy_rate)],
        ["until mapped behind the KV of 15 layers", milliseconds(finding.remap)],
        ["populated, a piece at a time before its first use", milliseconds(finding.populate)],
        ["old mappings taken away, later", milliseconds(finding.unmap)],
        ["first touch instead, each page once, from Python", milliseconds(finding.first_touch)],
        ["the same again: what Python takes of it", milliseconds(finding.touch)],
    ]
    return Table((f"{NUM_BYTES // MIB} MiB of chunks change hands", "ms"), rows).render()


def render_drop(findings: Sequence[DropFinding]) -> str:
    """One column for each run; times in ms."""

    def row(name: str, values: Sequence[str]) -> list[str]:
        return [name, *values]

    rows = [
        row("weights given up, MiB", [f"{f.commit_bytes / MIB:.0f}" for f in findings]),
        row("commit to usable blocks, slower worker", [_ms(max(f.commit)) for f in findings]),
        row("iteration of the pipeline, median", [_ms(f.iteration) for f in findings]),
        row("commit until both have committed", [_ms(f.hand_over) for f in findings]),
        row("... from there to the first batch", [_ms(f.first_batch) for f in findings]),
        row("... its way through the pipeline", [_ms(f.first_token) for f in findings]),
        row("plan written to first queued token", [_ms(f.queued_token) for f in findings]),
        row("exchange of all running requests", [_ms(f.exchange) for f in findings]),
        row("... MB to and from each worker", [f"{f.exchange_bytes / 1e6:.0f}" for f in findings]),
    ]
    headers = ("drop under load, ms", *(f"run {number + 1}" for number in range(len(findings))))
    return Table(headers, rows).render()


def render_restore(findings: Sequence[DropFinding]) -> str:
    """What the streams that go on see, undisturbed and while layers come back."""
    undisturbed = sorted(tpot for f in findings for tpot in f.undisturbed_tpots)
    restoring = sorted(tpot for f in findings for tpot in f.restore_tpots)
    ratio = percentile(restoring, 99) / percentile(undisturbed, 99)
    samples = {
        "undisturbed pipeline": sorted(gap for f in findings for gap in f.undisturbed_gaps),
        "while layers load": sorted(gap for f in findings for gap in f.restoring_gaps),
        "while requests come home": sorted(gap for f in findings for gap in f.returning_gaps),
        "TPOT by stream, undisturbed": undisturbed,
        "TPOT by stream, over the whole restore": restoring,
    }
    rows = [
        [name, *(_ms(percentile(found, percent)) for percent in (50, 99, 100))]
        for name, found in samples.items()
    ]
    loads = ", ".join(
        f"{finding.load_bytes / MIB:.0f} MiB in {max(finding.load):.2f} s" for finding in findings
    )
    return (
        f"{Table(('between tokens, ms', 'p50', 'p99', 'max'), rows).render()}\n\n"
        f"TPOT P99 over the restore: {ratio:.2f} of undisturbed (goal: 1.20)."
        f" Layers loaded by each worker meanwhile: {loads}; {_sources(findings)}."
    )


def _sources(findings: Sequence[DropFinding]) -> str:
    """How much came from where, and how fast."""
    parts = []
    for source in SOURCES:
        num_bytes = sum(finding.source_bytes[source] for finding in findings)
        seconds = sum(finding.source_seconds[source] for finding in findings)
        if seconds:
            rate = num_bytes / seconds / 1e6
            parts.append(f"{num_bytes / MIB:.0f} MiB from the {source} at {rate:.0f} MB/s")
    return ", ".join(parts)


def render_exchange(
    rates: dict[Transport, float],
    transfers: dict[Transport, list[TransferFinding]],
    loads: dict[Transport, LoadFinding],
) -> str:
    rows = []
    for transport, rate in rates.items():
        best = min(transfers[transport], key=lambda finding: finding.seconds)
        load = loads[transport]
        rows.append(
            [
                transport.value,
                f"{rate / 1e9:.2f}",
                f"{best.num_bytes / 1e6:.0f}",
                milliseconds(best.num_bytes / rate),
                milliseconds(best.seconds),
                f"{best.bytes_per_second / rate:.0%}",
                milliseconds(load.latency.p50),
                milliseconds(load.latency.p99),
                milliseconds(load.bound_seconds),
            ]
        )
    headers = (
        "exchange, idle",
        "link GB/s",
        "MB",
        "limit ms",
        "took ms",
        "of link",
        "activation behind it p50 ms",
        "p99 ms",
        "chunk + own ms",
    )
    return Table(headers, rows).render()


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds > 0.01 else milliseconds(seconds)


async def measure_links(
    out: Path,
) -> tuple[dict[Transport, float], dict[Transport, LoadFinding]]:
    """Bandwidth of exchange frames, and what activations wait behind them, by transport."""
    rates: dict[Transport, float] = {}
    loads: dict[Transport, LoadFinding] = {}
    data = np.ones(EXCHANGE_FRAME_BYTES, dtype=np.uint8).data

    def bandwidth(near: Near, link: StreamLink) -> float:
        return max(measure_bandwidth(near, link, data, 256 * MIB) for _ in range(3))

    async with EmbeddedNats() as server:
        command = [sys.executable, "-m", "benchmarks.links_peer", "--nats", server.url]
        async with ManagedProcess(command, log_path=out.parent / "logs" / "links-peer.log"):
            bus = await connect(server.url, service="bench", instance=NEAR)
            try:
                await wait_for_peer(bus)
                load = functools.partial(measure_load, limit=None, seconds=_LINK_SECONDS)
                for transport in Transport:
                    rates[transport] = await with_link(bus, transport, LinkConfig(), bandwidth)
                    loads[transport] = await with_link(bus, transport, LinkConfig(), load)
            finally:
                await bus.close()
    return rates, loads


async def run(options: argparse.Namespace) -> None:
    report = Report("Drop benchmark")
    machine = inspect_machine()
    busy = await measure_busy_share()
    copy_rate = await asyncio.to_thread(memory_copy_rate)
    report.add(f"{machine.describe()}, busy before: {busy:.0%}")
    report.add(
        f"Two workers on this host ({' '.join(_WORKER_ARGUMENTS)}), SmolLM2 in fp32."
        f" A copy in memory: {copy_rate / 1e9:.1f} GB/s."
    )
    memory = await asyncio.to_thread(measure_memory)
    report.add(render_memory(memory, copy_rate))
    rates, loads = await measure_links(options.out)
    drops: list[DropFinding] = []
    transfers: dict[Transport, list[TransferFinding]] = {}
    for transport in Transport:
        extra = () if transport is Transport.SHM else ("--no-link-shared-memory",)
        log_dir = options.out.parent / "logs" / transport.value
        async with drop_cluster(log_dir, [*_WORKER_ARGUMENTS, *extra]) as cluster:
            transfers[transport] = [await measure_transfer(cluster, home) for home in WORKERS * 2]
            if transport is Transport.SHM:
                drops = [await measure_drop(cluster) for _ in range(options.runs)]
    report.add(render_drop(drops))
    report.add(render_restore(drops))
    report.add(render_exchange(rates, transfers, loads))
    data: dict[str, Any] = {
        "machine": dataclasses.asdict(machine),
        "memory_copy_bytes_per_second": copy_rate,
        "memory": dataclasses.asdict(memory),
        "link_bytes_per_second": {each.value: rate for each, rate in rates.items()},
        "activations": {each.value: dataclasses.asdict(load) for each, load in loads.items()},
        "transfers": {
            each.value: [dataclasses.asdict(finding) for finding in findings]
            for each, findings in transfers.items()
        },
        "drops": [dataclasses.asdict(finding) for finding in drops],
    }
    report.save(options.out, data)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drop", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="drops and restores under load")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/drop"))
    return run_command(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
