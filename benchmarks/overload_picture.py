"""The picture of the overload benchmark, after the paper's Fig. 12.

demand and capacity of KV   | policy none | policy drop |   one column for each policy,
TTFT of each request        | policy none | policy drop |   axes shared along rows and columns
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.overload_run import PolicyRun

#: TTFT is also shown as the median of so many seconds of arrivals.
WINDOW_SECONDS = 5.0
DEMAND, CAPACITY, TTFT, MEDIAN = "#d95f02", "#1b1b1b", "#7570b3", "#3f3a86"
DROP, RESTORE = "#c0392b", "#1b7f4d"


def draw_runs(runs: Sequence[PolicyRun], tokens_per_block: int, path: Path) -> None:
    """Write a PNG with one column for each run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make_figure(runs, tokens_per_block).savefig(path)


def make_figure(runs: Sequence[PolicyRun], tokens_per_block: int) -> Figure:
    """One column for each run."""
    mpl.use("Agg")
    figure = Figure(figsize=(5.6 * len(runs), 6.4), layout="constrained", dpi=120)
    axes = figure.subplots(2, len(runs), sharex=True, sharey="row", squeeze=False)
    for column, run in enumerate(runs):
        _draw_memory(axes[0, column], run, tokens_per_block / 1000)
        _draw_ttft(axes[1, column], run)
        axes[0, column].set_title(f"--policy {run.policy.value}")
        axes[1, column].set_xlabel("time, s")
        for row in (0, 1):
            _mark(axes[row, column], run)
            axes[row, column].grid(alpha=0.25)
    for row in (0, 1):  # at the end: fixing one limit fixes the other, and columns share both
        axes[row, 0].set_ylim(bottom=0)
    _explain(figure, axes.flat)
    axes[0, 0].set_ylabel("KV cache, thousand tokens")
    axes[1, 0].set_ylabel("TTFT, s")
    return figure


def _draw_memory(axes: Axes, run: PolicyRun, scale: float) -> None:
    times = [point.at for point in run.load]
    demand = [point.demand_blocks * scale for point in run.load]
    used = [point.used_blocks * scale for point in run.load]
    capacity = [point.capacity_blocks * scale for point in run.load]
    axes.fill_between(times, used, color=DEMAND, alpha=0.25, linewidth=0, label="in use")
    axes.plot(times, demand, color=DEMAND, linewidth=1.4, label="demand (running + queued)")
    axes.step(times, capacity, color=CAPACITY, linewidth=1.4, where="post", label="capacity")


def _draw_ttft(axes: Axes, run: PolicyRun) -> None:
    done = [record for record in run.records if record.succeeded]
    axes.scatter(
        [record.sent_at for record in done],
        [record.ttft_seconds for record in done],
        s=9,
        color=TTFT,
        alpha=0.7,
        linewidths=0,
        label="TTFT of a request, at its arrival",
    )
    windows: dict[int, list[float]] = {}
    for record in done:
        windows.setdefault(int(record.sent_at // WINDOW_SECONDS), []).append(record.ttft_seconds)
    numbers = sorted(windows)
    axes.plot(
        [(number + 0.5) * WINDOW_SECONDS for number in numbers],
        [median(windows[number]) for number in numbers],
        color=MEDIAN,
        linewidth=1.2,
        label=f"median TTFT of {WINDOW_SECONDS:g} s",
    )


def _mark(axes: Axes, run: PolicyRun) -> None:
    """Vertical lines where layers were dropped and restored."""
    for name, moments, colour in (
        ("drop", run.drops, DROP),
        ("restore", run.restores, RESTORE),
    ):
        for number, at in enumerate(moments):
            label = name if number == 0 else None
            axes.axvline(at, color=colour, linewidth=1.2, linestyle="--", label=label)


def _explain(figure: Figure, all_axes: Iterable[Axes]) -> None:
    """One legend below everything."""
    found: dict[str, Artist] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=4)
