"""What a pipeline costs beside replicas: TPOT, throughput, and the bubbles of its stages.

`python -m benchmarks.pipeline` starts two workers of one thread each, puts them under a steady load
as replicas, drops layers by hand, and puts the pipeline under the same load; then the same pipeline
with prefill cut by token count instead of the lookahead formulation. See `benchmarks/README.md`.

The limit. A request on replicas of B decodes gets a token every T(B) = L layer(B) + head(B). As a
pipeline of two, two microbatches of B decodes take turns; each stage has half of the work, so a
request gets a token every two stage times: T(B) again, if the stages are equally long and nothing
is lost between them. Each worker reads half of the weights twice instead of all of them once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import secrets
import shlex
import sys
from pathlib import Path

from benchmarks.command import run_command
from benchmarks.machine import inspect_machine, measure_busy_share
from benchmarks.model import DEFAULT_MODEL, model_directory
from benchmarks.pipeline_run import LayoutResult, SteadyLoad, measure, running_cluster
from benchmarks.report import Report, Table, milliseconds, say
from benchmarks.tokenizer import load_tokenizer
from benchmarks.workload import TextPrompts
from services.worker.engine.config import ChunkPolicy


def tables(results: list[LayoutResult]) -> list[str]:
    """Latency and throughput against the first layout, and the stages."""
    base = results[0]
    rows, stages = [], []
    for result in results:
        tpot, ttft = result.summary.tpot_seconds, result.summary.ttft_seconds
        rows.append(
            [
                result.name,
                milliseconds(tpot.p50 if tpot else None),
                _ratio(tpot.p50 if tpot else None, _p50(base)),
                milliseconds(tpot.p99 if tpot else None),
                milliseconds(ttft.p50 if ttft else None),
                f"{result.tokens_per_second:.0f}",
                _ratio(result.tokens_per_second, base.tokens_per_second),
                str(result.summary.requests),
            ]
        )
        for stage in result.stages:
            is_stage = stage.busy_seconds > 0.0
            mean, p90 = stage.cost_model_error
            stages.append(
                [
                    f"{result.name}: {stage.worker_id}",
                    f"{stage.layers[0]}-{stage.layers[1]}",
                    f"{stage.bubble_share:.1%}" if is_stage else "-",
                    f"{mean:.1%}",
                    f"{p90:.1%}",
                ]
            )
    headers = ("layout", "TPOT p50 (ms)", "x", "TPOT p99 (ms)", "TTFT p50 (ms)", "tok/s", "x")
    stage_headers = ("stage", "layers", "bubble share", "cost model: mean error", "P90 error")
    return [Table((*headers, "requests"), rows).render(), Table(stage_headers, stages).render()]


def _p50(result: LayoutResult) -> float | None:
    return result.summary.tpot_seconds.p50 if result.summary.tpot_seconds else None


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value and base else "-"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--per-worker", type=int, default=24, help="requests running per worker")
    parser.add_argument("--prompt-tokens", type=int, default=96, help="mean; from half to 1.5 x")
    parser.add_argument("--output-tokens", type=int, default=96, help="mean; from half to 1.5 x")
    parser.add_argument("--settle", type=float, default=6.0, help="seconds before the window")
    parser.add_argument("--window", type=float, default=20.0, help="seconds that are measured")
    parser.add_argument("--worker-args", default="", help="further arguments of the workers")
    parser.add_argument("--seed", type=int, help="repeat a run; a fresh one is drawn otherwise")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pipeline"))
    return parser


async def run(options: argparse.Namespace) -> None:
    seed = options.seed if options.seed is not None else secrets.randbelow(2**31)
    model = model_directory(options.model)
    load = SteadyLoad(
        prompts=TextPrompts(load_tokenizer(model)),
        concurrency=2 * options.per_worker,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        settle_seconds=options.settle,
        window_seconds=options.window,
    )
    report = Report("Pipeline benchmark")
    report.add(f"{inspect_machine().describe()}, busy before: {await measure_busy_share():.0%}")
    report.add(
        f"two workers of one thread, {options.per_worker} requests running for each of them (closed"
        f" loop of {load.concurrency}), {load.prompt_tokens} prompt and {load.output_tokens} output"
        f" tokens on average (0.5 to 1.5 x), window of {load.window_seconds:g} s, seed {seed},"
        f" {os.cpu_count()} cores for all, client, router and NATS included"
    )
    results: list[LayoutResult] = []
    worker_options = shlex.split(options.worker_args)
    for policy in (ChunkPolicy.LOOKAHEAD, ChunkPolicy.TOKEN_COUNT):
        log_dir = options.out.parent / "logs"
        async with running_cluster(model, policy, log_dir, worker_options) as cluster:
            if not results:
                results.append(await measure(cluster, "replicas", load, seed))
            say(f"  dropping, to be cut by {policy.value}")
            await cluster.drop()
            results.append(await measure(cluster, f"pipeline, {policy.value}", load, seed + 1))
    for paragraph in tables(results):
        report.add(paragraph)
    report.save(options.out, {"seed": seed, "layouts": [dataclasses.asdict(r) for r in results]})


def main() -> int:
    return run_command(run(build_parser().parse_args()))


if __name__ == "__main__":
    sys.exit(main())
