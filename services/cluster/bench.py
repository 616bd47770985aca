"""`kunserve bench`: a quick look at the speed of a running cluster, in a closed loop.

Prompts are random token ids, so prefix caches do not help. `python -m benchmarks.serving` makes the
measurements that the README shows.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import sys

from pydantic import Field

from benchmarks.client import ClosedLoop, LengthControl, Target, run_load
from benchmarks.load import SUMMARY_HEADERS, first_errors, plan_requests, summary_row
from benchmarks.metrics import summarise
from benchmarks.report import Table
from benchmarks.workload import TokenIdPrompts
from services.cluster.client_settings import ClientSettings
from services.cluster.greeting import served_model
from services.cluster.http import ask
from services.cluster.program import Program
from shared.errors import KunserveError


class BenchSettings(ClientSettings):
    """The load."""

    requests: int = Field(default=32, ge=1, description="number of requests")
    concurrency: int = Field(default=8, ge=1, description="requests in flight at once")
    prompt_tokens: int = Field(default=128, ge=1, description="length of each prompt")
    output_tokens: int = Field(default=64, ge=1, description="length of each answer")
    vocab_size: int = Field(default=10_000, ge=1, description="token ids are drawn below this")
    request_timeout_seconds: float = Field(
        default=600.0, gt=0.0, description="longest time for one request"
    )


async def _measure(settings: BenchSettings, model: str) -> None:
    rng = random.Random(secrets.randbits(32))
    requests = plan_requests(
        TokenIdPrompts(range(settings.vocab_size)),
        rng,
        settings.requests,
        settings.prompt_tokens,
        settings.output_tokens,
    )
    headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else None
    target = Target(
        settings.url.rstrip("/"),
        model,
        LengthControl.IGNORE_EOS,
        headers,
        settings.request_timeout_seconds,
    )
    records = await run_load(target, requests, ClosedLoop(settings.concurrency))
    summary = summarise(records)
    sys.stdout.write(Table(SUMMARY_HEADERS, [summary_row(model, summary)]).render() + "\n")
    if summary.errors:
        raise KunserveError(
            f"{summary.errors} of {summary.requests} requests failed, for example:"
            f" {first_errors(records, limit=1)[0]}"
        )


def _run(settings: BenchSettings, _: argparse.Namespace) -> int:
    answer = ask(
        f"{settings.url.rstrip('/')}/v1/models",
        timeout_seconds=settings.timeout_seconds,
        bearer=settings.api_key,
    )
    if answer.status != 200:
        raise KunserveError(f"{settings.url} does not name its model: {answer.problem}")
    asyncio.run(_measure(settings, served_model(answer.body)))
    return 0


BENCH = Program(
    BenchSettings, _run, "kunserve bench\n  kunserve bench --requests 64 --concurrency 32"
)
