"""How long a new cluster takes from the command to its first token.

`python -m benchmarks.startup --kunserve .venv/bin/kunserve` starts `kunserve up` several times with
a model that is already converted, asks for one token as soon as `/ready` says so, and stops it. One
start before the measured ones converts the model and fills the page cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.client import ClosedLoop, PlannedRequest, Target, run_load, served_model
from benchmarks.command import run_command
from benchmarks.machine import inspect_machine, measure_busy_share
from benchmarks.processes import ManagedProcess, ServerError, free_port
from benchmarks.report import Report, Table, say, seconds


@dataclass(frozen=True, slots=True)
class Start:
    """One start: seconds from the command until `/ready`, and until the first token."""

    ready_seconds: float
    first_token_seconds: float


async def measure_start(command: list[str], log_path: Path, timeout_seconds: float) -> Start:
    """Start a cluster, get one token from it, stop it."""
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    started_at = time.monotonic()
    async with ManagedProcess([*command, "--port", str(port)], log_path=log_path) as process:
        await process.wait_ready(f"{base_url}/ready", timeout_seconds=timeout_seconds)
        ready_at = time.monotonic()
        target = Target(base_url, await served_model(base_url))
        prompt = f"Count to {random.randrange(10**6)}:"
        records = await run_load(target, [PlannedRequest(prompt, 8, 1)], ClosedLoop(1))
    if not records[0].succeeded:
        raise ServerError(f"the cluster was ready but gave no token: {records[0].error}")
    return Start(ready_at - started_at, records[0].chunk_times[0] - started_at)


def render(starts: list[Start]) -> str:
    """Minimum, median and maximum of both figures."""
    rows = []
    for name, values in (
        ("until /ready answers 200", [start.ready_seconds for start in starts]),
        ("until the first token", [start.first_token_seconds for start in starts]),
    ):
        figures = (min(values), statistics.median(values), max(values))
        rows.append([name, *map(seconds, figures)])
    return Table(("seconds from the command", "min", "median", "max"), rows).render()


async def run(options: argparse.Namespace) -> None:
    report = Report("Start-up benchmark")
    machine = inspect_machine()
    busy = await measure_busy_share()
    command = [str(options.kunserve), "up", *shlex.split(options.kunserve_args)]
    report.add(f"{machine.describe()}, busy before: {busy:.0%}")
    report.add(f"`{shlex.join(command)}`, {options.repeats} starts")
    starts = []
    log_path = options.out.parent / "logs" / "startup.log"
    await measure_start(command, log_path, options.first_timeout)
    for number in range(options.repeats):
        start = await measure_start(command, log_path, options.timeout)
        say(f"  start {number}: {start.first_token_seconds:.2f} s")
        starts.append(start)
    report.add(render(starts))
    data = {
        "machine": dataclasses.asdict(machine),
        "command": command,
        "starts": [dataclasses.asdict(start) for start in starts],
    }
    report.save(options.out, data)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--kunserve", type=Path, default=Path(".venv/bin/kunserve"))
    parser.add_argument("--kunserve-args", default="--workers 2", help="further arguments of `up`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one start")
    parser.add_argument("--first-timeout", type=float, default=300.0, help="with the conversion")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/startup"))
    return run_command(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
