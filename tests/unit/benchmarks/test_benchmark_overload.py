"""The load of the overload benchmark needs what it says, and the series shows what was in force."""

from __future__ import annotations

import pytest

from benchmarks.metrics import RequestRecord, summarise
from benchmarks.overload_picture import make_figure
from benchmarks.overload_run import Policy, PolicyRun
from benchmarks.overload_watch import (
    LayoutChange,
    LoadPoint,
    LoadSample,
    load_series,
    transition_starts,
)
from benchmarks.overload_workload import BURST_SECONDS, Scaling, plan_arrivals, read_trace
from shared.layout import Change, GroupPlan, LayoutState, MemberPlan, Plan, PlanPhase, Span
from shared.messages import LoadReport

SCALING = Scaling(
    context=0.5,
    output=1.0,
    time=1.5,
    until_seconds=60.0,
    base_per_second=0.3,
    base_seconds=90.0,
    max_context_tokens=1024,
    max_output_tokens=512,
)
BURST_TOKENS = 50_000


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_burst_needs_what_was_asked_for_and_arrives_in_its_time(seed: int) -> None:
    arrivals = plan_arrivals(read_trace(), SCALING, BURST_TOKENS, seed)
    burst = [arrival for arrival in arrivals if arrival.in_burst]
    largest = SCALING.max_context_tokens + SCALING.max_output_tokens
    assert 0 <= sum(arrival.tokens for arrival in burst) - BURST_TOKENS <= largest
    start, end = (second * SCALING.time for second in BURST_SECONDS)
    assert all(start <= arrival.seconds < end for arrival in burst)
    times = [arrival.seconds for arrival in arrivals]
    assert times == sorted(times)
    assert arrivals == plan_arrivals(read_trace(), SCALING, BURST_TOKENS, seed)


def test_seeds_differ_and_a_burst_beyond_the_trace_is_refused() -> None:
    first, second = (plan_arrivals(read_trace(), SCALING, BURST_TOKENS, seed) for seed in (1, 2))
    assert first != second
    with pytest.raises(ValueError, match="at most"):
        plan_arrivals(read_trace(), SCALING, 10**9, seed=1)


def plan(epoch: int, state: LayoutState, *groups: tuple[str, ...], prepare: bool = False) -> Plan:
    made = []
    for ids in groups:
        cuts = [k * 4 // len(ids) for k in range(len(ids) + 1)]
        members = tuple(
            MemberPlan(worker_id=ids[k], span=Span(start=cuts[k], end=cuts[k + 1]))
            for k in range(len(ids))
        )
        made.append(GroupPlan(group_id="+".join(ids), members=members))
    replicas = tuple(
        GroupPlan(
            group_id=worker_id,
            members=(MemberPlan(worker_id=worker_id, span=Span(start=0, end=4)),),
        )
        for worker_id in ("a", "b")
    )
    return Plan(
        term=1,
        epoch=epoch,
        state=state,
        phase=PlanPhase.PREPARE if prepare else PlanPhase.COMMIT,
        model_id="model",
        num_layers=4,
        groups=tuple(made),
        created_at=0.0,
        change=Change(cause="", started_at=0.0, previous_groups=replicas) if prepare else None,
    )


def load(
    at: float, worker_id: str, group_id: str, total: int, used: int, waiting: int
) -> LoadSample:
    report = LoadReport(
        worker_id=worker_id,
        group_id=group_id,
        epoch=1,
        block_size=16,
        kv_blocks_total=total,
        kv_blocks_used=used,
        requests_running=0,
        requests_waiting=waiting,
        waiting_blocks=waiting,
        num_preemptions=0,
    )
    return LoadSample(at, report)


LAYOUTS = [
    LayoutChange(0.0, plan(1, LayoutState.STABLE, ("a",), ("b",))),
    LayoutChange(2.0, plan(2, LayoutState.DROPPING, ("a", "b"), prepare=True)),
    LayoutChange(3.0, plan(3, LayoutState.DROPPING, ("a", "b"))),
    LayoutChange(4.0, plan(4, LayoutState.DROPPED, ("a", "b"))),
]


def test_the_series_adds_up_the_groups_in_force() -> None:
    samples = [
        load(1.0, "a", "a", 100, 90, 40),
        load(1.1, "b", "b", 100, 10, 0),
        load(2.5, "a", "a", 100, 95, 50),
        load(3.1, "b", "b", 100, 10, 0),  # late: that group is no more
        load(3.2, "a", "a+b", 260, 150, 0),
    ]
    points = load_series(samples, LAYOUTS)
    assert [(p.at, p.demand_blocks, p.used_blocks, p.capacity_blocks) for p in points] == [
        (1.1, 140, 100, 200),
        (2.5, 155, 105, 200),
        (3.2, 150, 150, 260),
    ]


def test_a_drop_begins_once_with_its_commit() -> None:
    assert transition_starts(LAYOUTS, LayoutState.DROPPING) == [3.0]
    assert transition_starts(LAYOUTS, LayoutState.RESTORING) == []


def run_with_capacity(capacity_blocks: int) -> PolicyRun:
    record = RequestRecord(0, 0.0, (1.0, 2.0), output_tokens=2, prompt_tokens=1)
    summary = summarise([record])
    return PolicyRun(
        policy=Policy.NONE,
        seed=1,
        arrivals=(),
        summary=summary,
        burst=summary,
        records=[record],
        load=[LoadPoint(at, 5, 5, capacity_blocks, 0) for at in (0.0, 1.0)],
        drops=(),
        restores=(),
        num_preemptions=0,
        is_restored=True,
        waiting_at_restore=(),
        transitions=(),
    )


def test_the_picture_has_room_for_the_highest_capacity_of_all_runs() -> None:
    figure = make_figure([run_with_capacity(10), run_with_capacity(20)], tokens_per_block=1000)
    assert all(axes.get_ylim()[1] >= 20 for axes in figure.axes[:2])
    assert all(axes.get_ylim()[0] == 0 for axes in figure.axes)
