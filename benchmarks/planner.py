"""`python -m benchmarks.planner`: how long the planner takes to plan a drop.

Workers of a few kinds, eight to a host, each with measured costs of its own and a load of its own.
For every size of cluster and share of copies to free, the median of some repetitions of

  read      leases and load reports made into candidates
  plan      the greedy, and the slices of every new pipeline
  message   the groups as the plan's message has them, validated
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.command import run_command
from benchmarks.machine import inspect_machine, measure_busy_share
from benchmarks.report import Report, Table, milliseconds
from services.planner.candidates import make_candidates
from services.planner.drop_plan import plan_drop
from services.planner.layout_policy import replica
from services.planner.pressure import GroupLoad
from shared.errors import KunserveError
from shared.layout import Span
from shared.messages import ModelCosts, WorkerInfo, WorkerState

NUM_LAYERS = 32
WORKERS_PER_HOST = 8
SIZES = (100, 1000, 10_000)
#: Copies to free, as a share of all.
SHARES = (0.0, 0.25, 0.5, 0.75)
_BLOCKS = 4096


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds of each part of one kind of plan."""

    num_workers: int
    num_merges: int
    num_groups: int
    read_seconds: float
    plan_seconds: float
    message_seconds: float


def make_worker(index: int, rng: random.Random) -> WorkerInfo:
    """A worker with 16 GiB, of which a replica's weights take 40 %."""
    layer_bytes, end_bytes, memory_bytes = 192 * 2**20, 256 * 2**20, 16 * 2**30
    whole_bytes = NUM_LAYERS * layer_bytes + 2 * end_bytes
    layer_seconds = 1e-3 * rng.uniform(1.0, 1.15)
    return WorkerInfo(
        worker_id=f"worker-{index:05}",
        incarnation=f"{index:x}",
        host=f"host-{index // WORKERS_PER_HOST}",
        pid=index,
        state=WorkerState.READY,
        model_id="model",
        num_layers=NUM_LAYERS,
        max_model_len=8192,
        device="cpu",
        dtype="float32",
        block_size=16,
        kv_block_bytes=NUM_LAYERS * 2**16,
        memory_bytes=memory_bytes,
        weight_bytes=whole_bytes,
        kv_bytes=memory_bytes - whole_bytes,
        free_bytes=0,
        layers=(Span(start=0, end=NUM_LAYERS),),
        costs=ModelCosts(
            layer_weight_bytes=layer_bytes,
            embedding_weight_bytes=end_bytes,
            head_weight_bytes=end_bytes,
            whole_weight_bytes=whole_bytes,
            kv_layer_block_bytes=2**16,
            layer_seconds=layer_seconds,
            head_seconds=4 * layer_seconds * rng.uniform(0.95, 1.05),
        ),
        started_at=0.0,
    )


def measure(num_workers: int, share: float, repetitions: int) -> Result:
    """Plan one drop some times; raises KunserveError where it comes out wrong."""
    rng = random.Random(num_workers)
    infos = [make_worker(index, rng) for index in range(num_workers)]
    workers = {info.worker_id: info for info in infos}
    groups = [replica(worker_id, NUM_LAYERS) for worker_id in workers]
    loads = {
        group.group_id: GroupLoad(_BLOCKS, rng.randrange(_BLOCKS), rng.randrange(_BLOCKS))
        for group in groups
    }
    num_merges = max(1, round(share * num_workers))
    spent: list[tuple[float, float, float]] = []
    gc.collect()
    gc.freeze()
    for _ in range(repetitions + 1):  # the first one warms up
        times = [time.perf_counter()]
        candidates = make_candidates(groups, workers, loads)
        times.append(time.perf_counter())
        dropped = plan_drop(candidates, num_merges=num_merges, needed_ratio=1.2)
        times.append(time.perf_counter())
        if dropped is None or dropped.num_merges != num_merges:
            raise KunserveError("the plan does not free what was asked for")
        layout = dropped.groups(epoch=2)
        times.append(time.perf_counter())
        spent.append((times[1] - times[0], times[2] - times[1], times[3] - times[2]))
    gc.unfreeze()
    if not all(group.tiles(NUM_LAYERS) for group in layout):
        raise KunserveError("a group of the plan does not hold every layer")
    read, plan, message = (median(column) for column in zip(*spent[1:], strict=True))
    return Result(num_workers, num_merges, len(layout), read, plan, message)


async def main(options: argparse.Namespace) -> None:
    """Measure everything and report it."""
    report = Report("Planning a drop")
    machine, busy = inspect_machine(), await measure_busy_share()
    report.add(f"{machine.describe()}; busy before: {busy:.0%}; median of {options.repetitions}")
    results = [
        measure(num_workers, share, options.repetitions)
        for num_workers in SIZES
        for share in SHARES
    ]
    rows = [
        [
            f"{result.num_workers}",
            f"{result.num_merges}",
            f"{result.num_groups}",
            milliseconds(result.read_seconds),
            milliseconds(result.plan_seconds),
            milliseconds(result.message_seconds),
        ]
        for result in results
    ]
    headers = ("workers", "copies freed", "groups after", "read, ms", "plan, ms", "message, ms")
    report.add(Table(headers, rows).render())
    report.save(options.out, {"machine": machine, "results": [asdict(r) for r in results]})


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/planner"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main(parse_options())))
