"""Put load on any OpenAI-compatible server: `python -m benchmarks.load --url … --model …`.

Closed loop with `--concurrency`, open loop with `--rate`. See `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.client import (
    ClosedLoop,
    LengthControl,
    OpenLoop,
    PlannedRequest,
    Schedule,
    Target,
    run_load,
)
from benchmarks.command import run_command
from benchmarks.metrics import LoadSummary, RequestRecord, summarise
from benchmarks.report import Report, Table, milliseconds, seconds
from benchmarks.tokenizer import load_tokenizer
from benchmarks.workload import PromptSource, TextPrompts, TokenIdPrompts, gamma_arrivals

SUMMARY_HEADERS = (
    "run",
    "ok",
    "errors",
    "output tok/s",
    "TTFT p50 / p90 / p99 (s)",
    "TPOT p50 / p99 (ms)",
    "largest gap p50 / max (s)",
    "E2E p50 / p99 (s)",
)


def summary_row(name: str, summary: LoadSummary) -> list[str]:
    """One line of the table under `SUMMARY_HEADERS`."""
    ttft, tpot = summary.ttft_seconds, summary.tpot_seconds
    gap, e2e = summary.max_gap_seconds, summary.e2e_seconds
    ttfts = (ttft.p50, ttft.p90, ttft.p99) if ttft else (None,) * 3
    tpots = (tpot.p50, tpot.p99) if tpot else (None,) * 2
    return [
        name,
        str(summary.requests - summary.errors),
        str(summary.errors),
        f"{summary.output_tokens_per_second:.1f}",
        " / ".join(map(seconds, ttfts)),
        " / ".join(map(milliseconds, tpots)),
        " / ".join(map(seconds, (gap.p50, gap.max) if gap else (None,) * 2)),
        " / ".join(map(seconds, (e2e.p50, e2e.p99) if e2e else (None,) * 2)),
    ]


def plan_requests(
    prompts: PromptSource, rng: random.Random, count: int, prompt_tokens: int, output_tokens: int
) -> list[PlannedRequest]:
    """`count` requests of one shape, each with a prompt of its own."""
    return [
        PlannedRequest(prompts.draw(rng, prompt_tokens), prompt_tokens, output_tokens)
        for _ in range(count)
    ]


def run_record(records: Sequence[RequestRecord], seed: int) -> dict[str, Any]:
    """A run as JSON: the summary, the seed, and each request with all its chunk times."""
    return {
        "seed": seed,
        "summary": dataclasses.asdict(summarise(records)),
        "requests": [dataclasses.asdict(record) for record in records],
    }


def first_errors(records: Sequence[RequestRecord], limit: int = 3) -> list[str]:
    """Different error texts of a run, a few."""
    return sorted({record.error for record in records if record.error})[:limit]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="base URL, without /v1")
    parser.add_argument("--model", required=True, help="model name in the requests")
    parser.add_argument("--api-key", default="", help="sent as a bearer token")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--concurrency", type=int, default=32, help="readers of a closed loop")
    pace.add_argument("--rate", type=float, help="open loop: mean requests per second")
    parser.add_argument("--shape", type=float, default=1.0, help="gamma shape of arrival gaps")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokenizer", type=Path, help="model directory: send words as text")
    source.add_argument("--vocab-size", type=int, help="send random token ids below this")
    parser.add_argument(
        "--length-control",
        type=LengthControl,
        choices=list(LengthControl),
        default=LengthControl.IGNORE_EOS,
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one request")
    parser.add_argument("--seed", type=int, help="repeat a run; a fresh one is drawn otherwise")
    parser.add_argument("--out", type=Path, help="write PATH.json and PATH.md")
    return parser


async def run(options: argparse.Namespace) -> None:
    seed = options.seed if options.seed is not None else secrets.randbelow(2**31)
    rng = random.Random(seed)
    prompts: PromptSource = TokenIdPrompts(range(options.vocab_size or 0))
    if options.tokenizer is not None:
        prompts = TextPrompts(load_tokenizer(options.tokenizer))
    requests = plan_requests(
        prompts, rng, options.requests, options.prompt_tokens, options.output_tokens
    )
    schedule: Schedule = ClosedLoop(options.concurrency)
    if options.rate is not None:
        arrivals = gamma_arrivals(rng, options.requests, options.rate, shape=options.shape)
        schedule = OpenLoop(tuple(arrivals))
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else None
    target = Target(options.url, options.model, options.length_control, headers, options.timeout)
    records = await run_load(target, requests, schedule)
    report = Report(f"Load on {options.model}")
    report.add(f"{options.requests} requests, {schedule_text(schedule)}, seed {seed}")
    report.add(Table(SUMMARY_HEADERS, [summary_row("load", summarise(records))]).render())
    for error in first_errors(records):
        report.add(f"error: {error}")
    if options.out is not None:
        report.save(options.out, run_record(records, seed))


def schedule_text(schedule: Schedule) -> str:
    """The schedule in words."""
    match schedule:
        case ClosedLoop(concurrency):
            return f"closed loop of {concurrency}"
        case OpenLoop(arrivals):
            return f"open loop, {len(arrivals) / arrivals[-1]:.2f} requests/s"


def main() -> int:
    return run_command(run(build_parser().parse_args()))


if __name__ == "__main__":
    sys.exit(main())
