"""The overload benchmark: `python -m benchmarks.overload`.

A cluster of two CPU workers whose weights are about 40 % of their memory gets a burst whose
requests together need 1.5 times the KV cache there is, once with `--policy drop` and once with
`--policy none` (where KV overflows, the youngest request is computed again later). Equal requests
at equal times for both, everything else equal too; several seeds. Prints tables, and writes a
picture after the paper's Fig. 12. How the load is made from a trace:
`benchmarks/overload_workload.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.command import run_command
from benchmarks.machine import inspect_machine, measure_busy_share
from benchmarks.model import DEFAULT_MODEL, model_directory
from benchmarks.overload_picture import draw_runs
from benchmarks.overload_run import BLOCK_TOKENS, ClusterSetup, PolicyRun, measure_policy
from benchmarks.overload_workload import Arrival, Scaling, plan_arrivals, read_trace
from benchmarks.report import Report, Table, milliseconds, say, seconds
from benchmarks.tokenizer import load_tokenizer
from benchmarks.workload import TextPrompts
from services.planner.settings import Policy

RUN_HEADERS = (
    "run",
    "ok",
    "errors",
    "TTFT p50 / p90 / p99 / max (s)",
    "TPOT p50 / p99 (ms)",
    "stall p90 / p99 / max (s)",
    "output tok/s",
    "preempted",
    "drops",
    "restores",
    "peak demand",
    "peak capacity",
)
#: Figures compared between the policies: less is better, but for the last one.
FIGURES: dict[str, Callable[[PolicyRun], float]] = {
    "TTFT p50": lambda run: _percentiles(run, "ttft_seconds")[0],
    "TTFT p90": lambda run: _percentiles(run, "ttft_seconds")[1],
    "TTFT p99": lambda run: _percentiles(run, "ttft_seconds")[2],
    "TPOT p50": lambda run: _percentiles(run, "tpot_seconds")[0],
    "TPOT p99": lambda run: _percentiles(run, "tpot_seconds")[2],
    "stall p99": lambda run: _percentiles(run, "max_gap_seconds")[2],
    "output tok/s": lambda run: run.summary.output_tokens_per_second,
}


def _percentiles(run: PolicyRun, name: str) -> tuple[float, float, float, float]:
    """P50, P90, P99 and maximum of one distribution of a run; zeros where nothing succeeded."""
    found = {
        "ttft_seconds": run.summary.ttft_seconds,
        "tpot_seconds": run.summary.tpot_seconds,
        "max_gap_seconds": run.summary.max_gap_seconds,
    }
    values = found[name]
    return (values.p50, values.p90, values.p99, values.max) if values else (0.0,) * 4


def run_row(run: PolicyRun) -> list[str]:
    """One line of the table of runs."""
    ttft, tpot = _percentiles(run, "ttft_seconds"), _percentiles(run, "tpot_seconds")
    stall = _percentiles(run, "max_gap_seconds")  # the longest wait within each stream
    summary = run.summary
    return [
        f"seed {run.seed}, {run.policy.value}",
        str(summary.requests - summary.errors),
        str(summary.errors),
        " / ".join(map(seconds, ttft)),
        " / ".join(map(milliseconds, (tpot[0], tpot[2]))),
        " / ".join(map(seconds, stall[1:])),
        f"{summary.output_tokens_per_second:.0f}",
        str(run.num_preemptions),
        str(len(run.drops)),
        _restores(run),
        f"{run.peak_demand:.2f} x",
        f"{run.peak_capacity:.2f} x",
    ]


def _restores(run: PolicyRun) -> str:
    """How many, and what an operator would ask about."""
    notes = [f"{count} waited" for count in run.waiting_at_restore if count]
    notes += [] if run.is_restored else ["not whole at the end"]
    return f"{len(run.restores)}" + (f" ({', '.join(notes)})" if notes else "")


def ratio_table(runs: Sequence[PolicyRun]) -> Table:
    """Policy none over policy drop for each seed, and the median of the seeds."""
    by_seed: dict[int, dict[Policy, PolicyRun]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, {})[run.policy] = run
    rows = []
    ratios: dict[str, list[float]] = {name: [] for name in FIGURES}
    for seed, pair in sorted(by_seed.items()):
        if len(pair) < 2:
            continue
        row = [f"seed {seed}"]
        for name, figure in FIGURES.items():
            ours, theirs = figure(pair[Policy.DROP]), figure(pair[Policy.NONE])
            ratios[name].append(theirs / ours if ours else 0.0)
            row.append(f"{ratios[name][-1]:.2f}")
        rows.append(row)
    if rows:
        rows.append(["median", *(f"{statistics.median(all_):.2f}" for all_ in ratios.values())])
    return Table(("none / drop", *FIGURES), rows)


def transition_table(runs: Sequence[PolicyRun]) -> Table:
    """What `/cluster` told of the drops and restores."""
    rows = []
    for run in runs:
        for transition in run.transitions:
            phases = transition["phase_seconds"]
            rows.append(
                [
                    f"seed {run.seed}, {transition['state']}",
                    *(f"{phases[name]:.3f}" if name in phases else "-" for name in PHASES),
                    transition["result"],
                    transition["cause"],
                ]
            )
    return Table(("transition", *(f"{name} (s)" for name in PHASES), "result", "cause"), rows)


PHASES = ("prepare", "commit", "exchange")


def describe(arrivals: Sequence[Arrival], capacity_tokens: int, scaling: Scaling) -> str:
    """The workload in words."""
    burst = [arrival for arrival in arrivals if arrival.in_burst]
    prompts = statistics.mean(arrival.prompt_tokens for arrival in arrivals)
    outputs = statistics.mean(arrival.output_tokens for arrival in arrivals)
    needed = sum(arrival.tokens for arrival in burst)
    return (
        f"{len(arrivals)} requests in {arrivals[-1].seconds:.0f} s, on average {prompts:.0f} prompt"
        f" and {outputs:.0f} output tokens; {len(burst)} of them are the burst, from"
        f" {burst[0].seconds:.0f} to {burst[-1].seconds:.0f} s, and need {needed} tokens of KV:"
        f" {needed / capacity_tokens:.2f} x the {capacity_tokens} there are. From the Azure LLM"
        f" traces 2023: lengths of the conversation trace, prompts x {scaling.context:g}, outputs"
        f" x {scaling.output:g}; arrivals of the code trace around its largest burst, thinned, time"
        f" x {scaling.time:g}, over a base of {scaling.base_per_second:g} requests/s"
    )


async def run(options: argparse.Namespace) -> None:
    model = model_directory(options.model)
    setup = ClusterSetup(
        command=(
            str(options.kunserve),
            "up",
            *("--model", str(model), "--workers", str(options.workers)),
            *("--device-memory", options.device_memory),
            *shlex.split(options.kunserve_args),
        ),
        log_dir=options.out.parent / "logs",
        prompts=TextPrompts(load_tokenizer(model)),
    )
    report = Report("Overload benchmark")
    machine, busy = inspect_machine(), await measure_busy_share()
    report.add(f"{machine.describe()}; busy before: {busy:.0%}")
    report.add(f"`{shlex.join(setup.command)} --policy ...`")
    scaling = make_scaling(options)
    trace = read_trace()
    runs: list[PolicyRun] = []
    for seed in range(1, options.seeds + 1):

        def workload(capacity_tokens: int, seed: int = seed) -> list[Arrival]:
            need = round(options.need * capacity_tokens)
            return plan_arrivals(trace, scaling, need, seed)

        for policy in options.policies:
            runs.append(await measure_policy(setup, policy, seed, workload))
            say(f"  {' | '.join(run_row(runs[-1]))}")
    first = runs[0]
    report.add(describe(first.arrivals, first.load[0].capacity_blocks * BLOCK_TOKENS, scaling))
    report.add(Table(RUN_HEADERS, [run_row(one) for one in runs]).render())
    report.add("Policy none over policy drop:\n\n" + ratio_table(runs).render())
    report.add(transition_table(runs).render())
    picture = options.out.with_suffix(".png")
    draw_runs([one for one in runs if one.seed == first.seed], BLOCK_TOKENS, picture)
    report.add(f"picture of seed {first.seed}: {picture}")
    data = {"machine": machine, "options": vars(options), "runs": runs}
    report.save(options.out, {name: _plain(value) for name, value in data.items()})
    for problem in sorted({one.error for run in runs for one in run.records if one.error})[:3]:
        say(f"error: {problem}")


def _plain(value: object) -> object:
    """Dataclasses as dictionaries, for JSON."""
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def make_scaling(options: argparse.Namespace) -> Scaling:
    """How the trace is scaled; with `--quick` nothing follows the burst."""
    return Scaling(
        context=options.context_scale,
        output=options.output_scale,
        time=options.time_scale,
        until_seconds=30.0 if options.quick else options.until,
        base_per_second=options.base_rate,
        base_seconds=60.0 if options.quick else options.base_seconds,
        max_context_tokens=options.max_context,
        max_output_tokens=options.max_output,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    beside_python = Path(sys.executable).parent / "kunserve"
    parser.add_argument("--kunserve", type=Path, default=beside_python, help="the command")
    parser.add_argument("--kunserve-args", default="", help="further arguments of `up`")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device-memory", default="1220MiB", help="of each worker")
    parser.add_argument("--seeds", type=int, default=3, help="how many lists of requests")
    parser.add_argument(
        "--policies", nargs="+", type=Policy, choices=list(Policy), default=[*reversed(Policy)]
    )
    parser.add_argument("--quick", action="store_true", help="one seed, only the burst")
    parser.add_argument("--need", type=float, default=1.5, help="KV of the burst over capacity")
    parser.add_argument("--context-scale", type=float, default=0.15)
    parser.add_argument("--output-scale", type=float, default=1.0)
    parser.add_argument("--max-context", type=int, default=1024, help="longest prompt, tokens")
    parser.add_argument("--max-output", type=int, default=512, help="longest output, tokens")
    parser.add_argument("--time-scale", type=float, default=1.0)
    parser.add_argument("--until", type=float, default=60.0, help="second of the trace")
    parser.add_argument("--base-rate", type=float, default=0.15, help="requests/s besides")
    parser.add_argument("--base-seconds", type=float, default=100.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overload"))
    return parser


def main() -> int:
    options = build_parser().parse_args()
    options.seeds = 1 if options.quick else options.seeds
    return run_command(run(options))


if __name__ == "__main__":
    sys.exit(main())
