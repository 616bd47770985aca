"""Who gets a request: free KV, what was just sent, freshness, failures, ties."""

from __future__ import annotations

from services.router.dispatch import DispatchLedger, GroupLoad, blocks_for, rank_groups
from services.router.fleet import FRESH_SECONDS, INHIBIT_SECONDS, Fleet
from shared.layout import GroupPlan, LayoutState, MemberPlan, Plan, Span
from shared.messages import LoadReport, WorkerInfo, WorkerState


def load(name: str, free: int, waiting: int = 0, booked: int = 0) -> GroupLoad:
    return GroupLoad(f"g-{name}", name, free, waiting, booked)


def info(worker_id: str, state: WorkerState = WorkerState.READY, run: str = "1") -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        incarnation=run,
        host="h",
        pid=1,
        state=state,
        model_id="m",
        num_layers=4,
        max_model_len=100,
        device="cpu",
        dtype="float32",
        block_size=16,
        kv_block_bytes=1,
        memory_bytes=1,
        weight_bytes=1,
        kv_bytes=1,
        free_bytes=1,
        layers=(),
        started_at=0.0,
    )


def report(worker_id: str, used: int = 0, total: int = 10, received: int = 0) -> LoadReport:
    return LoadReport(
        worker_id=worker_id,
        group_id=f"g-{worker_id}",
        epoch=1,
        block_size=16,
        kv_blocks_total=total,
        kv_blocks_used=used,
        requests_running=0,
        requests_waiting=0,
        waiting_blocks=0,
        received={"r": received},
    )


def plan(groups: list[list[str]], epoch: int = 1, dry_run: bool = False) -> Plan:
    def members(names: list[str]) -> tuple[MemberPlan, ...]:
        size = 4 // len(names)
        return tuple(
            MemberPlan(worker_id=name, span=Span(start=size * n, end=size * (n + 1)))
            for n, name in enumerate(names)
        )

    return Plan(
        term=1,
        epoch=epoch,
        state=LayoutState.STABLE,
        model_id="m",
        num_layers=4,
        groups=tuple(
            GroupPlan(group_id=f"g-{names[0]}", members=members(names)) for names in groups
        ),
        created_at=0.0,
        dry_run=dry_run,
    )


def fleet_of(groups: list[list[str]]) -> Fleet:
    fleet = Fleet("r")
    fleet.apply_plan(plan(groups))
    for names in groups:
        for name in names:
            fleet.apply_worker(info(name))
            fleet.apply_load(report(name), 0.0)
    return fleet


def leaders(fleet: Fleet, now: float = 0.0) -> list[str]:
    return sorted(group.leader for group in fleet.candidates(now))


def test_the_most_spare_kv_comes_first() -> None:
    groups = [load("a", 10, waiting=5), load("b", 9, booked=1), load("c", 20, waiting=30)]
    assert [group.leader for group in rank_groups(groups, "x")] == ["b", "a", "c"]


def test_ties_are_spread_and_repeatable() -> None:
    groups = [load(name, 10) for name in "abcd"]
    firsts = [rank_groups(groups, f"router request-{n}")[0].leader for n in range(200)]
    assert all(firsts.count(name) > 20 for name in "abcd")
    assert rank_groups(groups, "s") == rank_groups(reversed(groups), "s")


def test_blocks_cover_the_next_token() -> None:
    assert [blocks_for(tokens, 16) for tokens in (0, 15, 16, 17)] == [1, 1, 2, 2]


def test_bookings_count_until_a_report_includes_them() -> None:
    ledger = DispatchLedger()
    numbers = [ledger.book(blocks) for blocks in (3, 4, 5)]
    assert ledger.booked_blocks == 12
    ledger.cancel(numbers[1])
    assert ledger.booked_blocks == 8
    ledger.settle(numbers[0])
    assert ledger.booked_blocks == 5
    ledger.settle(numbers[2])
    assert ledger.booked_blocks == 0
    assert ledger.book(1) > numbers[2]


def test_the_ledger_shows_in_the_groups_load() -> None:
    fleet = fleet_of([["a"]])
    number = fleet.ledger("a").book(4)
    assert fleet.candidates(0.0)[0].spare_blocks == 6
    fleet.apply_load(report("a", used=4, received=number), 0.1)
    assert fleet.candidates(0.1)[0].spare_blocks == 6


def test_stale_reports_disqualify() -> None:
    fleet = fleet_of([["a"], ["b"]])
    fleet.apply_load(report("b"), 2.0)
    assert leaders(fleet, now=2.0) == ["b"]
    assert leaders(fleet, now=2.0 + FRESH_SECONDS + 0.1) == []


def test_every_member_of_a_group_must_do_its_part() -> None:
    fleet = fleet_of([["a", "b"], ["c"]])
    assert leaders(fleet) == ["a", "c"]
    for state in (WorkerState.STARTING, WorkerState.RELOADING):
        fleet.apply_worker(info("b", state))
        assert leaders(fleet) == ["c"]


def test_a_group_takes_requests_while_a_stage_drains_but_not_its_leader() -> None:
    """The stage computes until the group is restored; the leader takes nothing new."""
    fleet = fleet_of([["a", "b"], ["c"]])
    fleet.apply_worker(info("b", WorkerState.DRAINING))
    assert leaders(fleet) == ["a", "c"]
    fleet.apply_worker(info("a", WorkerState.DRAINING))
    assert leaders(fleet) == ["c"]
    fleet.remove_worker("c")
    assert leaders(fleet) == []


def test_a_broken_group_gets_nothing_before_its_leader_reports() -> None:
    """A follower may know first, and the leader may be dead."""
    fleet = fleet_of([["a", "b"], ["c"]])
    fleet.mark_broken("b")
    fleet.apply_load(report("b"), 0.1)
    assert leaders(fleet, now=0.1) == ["c"]
    fleet.apply_load(report("a"), 0.1)
    assert leaders(fleet, now=0.1) == ["a", "c"]


def test_whom_the_plan_has_serve() -> None:
    fleet = fleet_of([["a", "b"]])
    assert fleet.is_placed("a")
    assert fleet.is_placed("b")
    assert not fleet.is_placed("c")


def test_a_failed_worker_rests() -> None:
    fleet = fleet_of([["a"]])
    fleet.inhibit("a", 0.0)
    assert leaders(fleet, now=0.5) == []
    fleet.apply_load(report("a"), INHIBIT_SECONDS)
    assert leaders(fleet, now=INHIBIT_SECONDS) == ["a"]


def test_a_worker_that_refused_is_asked_after_its_next_report() -> None:
    fleet = fleet_of([["a"]])
    fleet.mark_full("a")
    assert leaders(fleet) == []
    assert [group.leader for group in fleet.serving_groups(0.0)] == ["a"]
    fleet.apply_load(report("a"), 0.1)
    assert leaders(fleet, now=0.1) == ["a"]


def test_a_restart_wipes_what_was_known() -> None:
    fleet = fleet_of([["a"]])
    fleet.ledger("a").book(9)
    fleet.inhibit("a", 0.0)
    fleet.apply_worker(info("a", run="2"))
    assert leaders(fleet) == []
    fleet.apply_load(report("a"), 0.1)
    assert fleet.candidates(0.1)[0].spare_blocks == 10


def test_old_and_dry_plans_change_nothing() -> None:
    fleet = fleet_of([["a"]])
    assert not fleet.apply_plan(plan([["b"]], epoch=1))
    assert not fleet.apply_plan(plan([["b"]], epoch=2, dry_run=True))
    assert leaders(fleet) == ["a"]
    assert fleet.apply_plan(plan([["b"]], epoch=2))


def test_the_longest_request_is_what_the_largest_worker_says() -> None:
    fleet = fleet_of([["a"], ["b"]])
    fleet.apply_worker(info("a").model_copy(update={"max_model_len": 80}))
    fleet.apply_load(report("a"), 0.0)
    assert fleet.longest_request(0.0) == 100
    fleet.mark_full("b")
    fleet.apply_load(report("b", total=0), 0.0)  # a pipeline whose members still hand over
    assert fleet.longest_request(0.0) == 100
    assert Fleet("r").longest_request(0.0) is None
