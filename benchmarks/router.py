"""The router benchmark: one router process on one core, real NATS, stub workers, many streams.

    this process -- HTTP, 256 event streams --> router -- NATS --> stub workers
     (client)                                   core 0             one frame per step

    python -m benchmarks.router

Each phase holds a number of streams open, each of which gets one token per step, and meanwhile
sends short probes. A probe's added latency is the time from its request to its first token, less
what the stub held it; so it is HTTP, tokenising, dispatch, NATS there and back, detokenising and
the event. Every stream's text is checked to be exactly what the stub sent.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from benchmarks.command import run_command
from benchmarks.machine import inspect_machine, measure_busy_share
from benchmarks.model import DEFAULT_MODEL, tokenizer_directory
from benchmarks.processes import ManagedProcess, free_port
from benchmarks.report import Report, Table, milliseconds
from benchmarks.router_phase import STUB_MODEL_NAME, Phase, PhaseResult, PhaseRunner, Setup
from benchmarks.stub_worker import read_vocabulary
from benchmarks.tokenizer import load_tokenizer
from shared.embedded_nats import EmbeddedNats

_DEPLOYMENT = "bench"

#: Runs the rest of the command line on one core.
_PIN = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
os.execv(sys.argv[2], sys.argv[2:])
"""


@asynccontextmanager
async def running_setup(
    options: argparse.Namespace, directory: Path, router_core: int | None
) -> AsyncIterator[Setup]:
    """Start nats-server, stub workers and the router; stop them at the end."""
    steps_per_second = options.events_per_second / options.streams
    model_dir = tokenizer_directory(options.model)
    async with EmbeddedNats() as nats_server:
        stub = [sys.executable, "-m", "benchmarks.stub_worker", "--nats", nats_server.url]
        stub += ["--deployment", _DEPLOYMENT, "--model-id", STUB_MODEL_NAME]
        stub += ["--model-dir", str(model_dir)]
        stub += ["--workers", str(options.workers), "--steps-per-second", str(steps_per_second)]
        stub += ["--stats", str(directory / "stub.json")]
        port = free_port()
        router = [sys.executable, "-m", "services.cli", "router", "--nats", nats_server.url]
        router += ["--deployment", _DEPLOYMENT, "--port", str(port), "--model", options.model]
        router += ["--served-model-name", STUB_MODEL_NAME]
        if router_core is not None:
            router = [sys.executable, "-c", _PIN, str(router_core), *router]
        async with (
            ManagedProcess(stub, log_path=directory / "stub.log"),
            ManagedProcess(router, log_path=directory / "router.log") as process,
        ):
            url = f"http://127.0.0.1:{port}"
            await process.wait_ready(f"{url}/ready", timeout_seconds=60)
            yield Setup(
                url,
                process.pid,
                steps_per_second,
                load_tokenizer(model_dir),
                read_vocabulary(model_dir),
            )


def result_row(result: PhaseResult) -> list[str]:
    """One line of the table."""
    added, gaps = result.added_first_token, result.gaps
    return [
        str(result.streams),
        f"{result.offered_events_per_second:,.0f}",
        f"{result.delivered_events_per_second:,.0f}",
        f"{result.router_cpu_share:.0%}",
        " / ".join(map(milliseconds, (added.p50, added.p90, added.p99) if added else (None,) * 3)),
        " / ".join(map(milliseconds, (gaps.p50, gaps.p99, gaps.max) if gaps else (None,) * 3)),
        str(len(result.problems)),
    ]


HEADERS = (
    "open streams",
    "offered events/s",
    "delivered events/s",
    "router CPU",
    "added first-token latency p50 / p90 / p99 (ms)",
    "gap p50 / p99 / max (ms)",
    "streams with a fault",
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="its tokenizer is used")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--events-per-second", type=float, default=10_000.0, help="of all streams")
    parser.add_argument("--workers", type=int, default=2, help="stub workers")
    parser.add_argument("--duration", type=float, default=15.0, help="seconds of each phase")
    parser.add_argument("--probes-per-second", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/router"))
    return parser


async def run(options: argparse.Namespace) -> None:
    report = Report("Router benchmark")
    machine = inspect_machine()
    busy = await measure_busy_share()
    router_core, *others = sorted(os.sched_getaffinity(0))
    if others:
        os.sched_setaffinity(0, others)
    placement = f"router on core {router_core}, all else on {others}" if others else "not pinned"
    report.add(f"{machine.describe()}, busy before: {busy:.0%}; {placement}")
    counts = [0, options.streams // 4, options.streams]
    results = []
    directory = options.out.parent / "logs"
    directory.mkdir(parents=True, exist_ok=True)
    async with running_setup(options, directory, router_core if others else None) as setup:
        timeout = aiohttp.ClientTimeout(total=options.duration + 60)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            runner = PhaseRunner(setup, session, random.Random())
            await runner.run(Phase(8, 2.0, options.probes_per_second))  # warm-up
            for count in counts:
                phase = Phase(count, options.duration, options.probes_per_second)
                results.append(await runner.run(phase))
    stub_stats = json.loads((directory / "stub.json").read_text())
    report.add(Table(HEADERS, [result_row(result) for result in results]).render())
    report.add(f"largest delay of a stub's step: {stub_stats['max_step_lag_seconds'] * 1e3:.1f} ms")
    for problem in sorted({problem for result in results for problem in result.problems})[:5]:
        report.add(f"fault: {problem}")
    data = {
        "machine": dataclasses.asdict(machine),
        "phases": [dataclasses.asdict(result) for result in results],
        "stub": stub_stats,
    }
    report.save(options.out, data)


def main() -> int:
    return run_command(run(build_parser().parse_args()))


if __name__ == "__main__":
    sys.exit(main())
