"""What the planner makes of acknowledgements and load reports."""

from __future__ import annotations

from typing import Any

from services.planner.observations import AckBoard, LoadBoard, QueueBoard
from services.planner.pressure import GroupLoad
from shared.messages import AckState, LoadReport, PlanAck, QueueReport
from tests.planner_support import plan_for


def ack(worker_id: str, term: int = 1, epoch: int = 1, **fields: Any) -> PlanAck:
    fields.setdefault("state", AckState.APPLIED)
    return PlanAck(worker_id=worker_id, term=term, epoch=epoch, **fields)


def load(worker_id: str, epoch: int = 1) -> LoadReport:
    return LoadReport(
        worker_id=worker_id,
        group_id=f"g-{worker_id}",
        epoch=epoch,
        block_size=16,
        kv_blocks_total=10,
        kv_blocks_used=0,
        requests_running=0,
        requests_waiting=0,
        waiting_blocks=0,
    )


def test_queues_of_routers_add_up_until_they_are_empty_or_stale() -> None:
    board = QueueBoard(stale_seconds=2.0)
    assert board.waiting_blocks(16, now=0.0) == 0
    for router_id, at in (("r0", 10.0), ("r1", 11.0)):
        report = QueueReport(router_id=router_id, requests_waiting=2, waiting_tokens=160)
        board.record(report, now=at)
    assert board.waiting_blocks(16, now=12.0) == 22
    assert board.waiting_blocks(16, now=12.5) == 11
    board.record(QueueReport(router_id="r1", requests_waiting=0, waiting_tokens=0), now=12.5)
    assert board.waiting_blocks(16, now=12.5) == 0


def test_a_load_is_stale_until_reported_and_again_after_a_while() -> None:
    board = LoadBoard(stale_seconds=2.0)
    groups = plan_for("a", "b").groups
    assert board.group_loads(groups, now=0.0) == ({}, {"a", "b"})
    board.record(load("a", epoch=7), now=10.0)
    assert board.group_loads(groups, now=12.0) == ({"g-a": GroupLoad(10, 0, 0)}, {"b"})
    assert board.group_loads(groups, now=12.1) == ({}, {"a", "b"})
    assert board.newest_epoch == 7
    board.forget("a")
    assert board.group_loads(groups, now=10.0) == ({}, {"a", "b"})


def test_a_report_about_another_group_says_nothing() -> None:
    board = LoadBoard(stale_seconds=2.0)
    board.record(load("a").model_copy(update={"group_id": "p7-a"}), now=10.0)
    assert board.group_loads(plan_for("a").groups, now=10.0) == ({}, {"a"})


def test_a_transition_is_applied_when_every_member_answered() -> None:
    board = AckBoard(timeout_seconds=5.0)
    board.expect(plan_for("a", "b", epoch=3), now=10.0)
    board.record(ack("a", epoch=3))
    board.record(ack("b", epoch=2))
    assert board.settle(["a", "b"], now=11.0) is None
    board.record(ack("b", epoch=4))
    transition = board.settle(["a", "b"], now=12.5)
    assert transition is not None
    assert (transition.epoch, transition.result) == (3, "applied")
    assert transition.phase_seconds == {"commit": 2.5}
    assert board.settle(["a", "b"], now=13.0) is None


def test_a_silent_worker_is_named_after_the_deadline() -> None:
    board = AckBoard(timeout_seconds=5.0)
    board.expect(plan_for("a", "b"), now=10.0)
    board.record(ack("a"))
    assert board.settle(["a", "b"], now=14.9) is None
    transition = board.settle(["a", "b"], now=15.0)
    assert transition is not None
    assert transition.result == "no answer from b"


def test_a_worker_that_left_is_not_waited_for() -> None:
    board = AckBoard(timeout_seconds=5.0)
    board.expect(plan_for("a", "b"), now=10.0)
    board.record(ack("a"))
    assert board.settle(["a"], now=10.1) is not None


def test_a_newer_plan_supersedes_what_was_waited_for() -> None:
    board = AckBoard(timeout_seconds=5.0)
    assert board.expect(plan_for("a", epoch=1), now=10.0) is None
    superseded = board.expect(plan_for("a", "b", epoch=2), now=11.0)
    assert superseded is not None
    assert (superseded.epoch, superseded.result) == (1, "superseded by epoch 2")


def test_a_refusal_is_told() -> None:
    board = AckBoard(timeout_seconds=5.0)
    board.expect(plan_for("a"), now=10.0)
    board.record(ack("a", state=AckState.REFUSED, detail="no memory"))
    transition = board.settle(["a"], now=10.1)
    assert transition is not None
    assert transition.result == "a refused: no memory"


def test_the_highest_applied_version_counts_and_old_answers_do_not_replace_new_ones() -> None:
    board = AckBoard(timeout_seconds=5.0)
    assert board.applied == (0, 0)
    board.record(ack("a", term=3, epoch=9))
    board.record(ack("a", term=3, epoch=8))
    board.record(ack("b", term=5, epoch=2, state=AckState.REFUSED))
    assert board.applied == (3, 9)


def test_when_a_worker_applied_is_the_first_time_it_said_so() -> None:
    board = AckBoard(timeout_seconds=5.0)
    board.record(ack("a", epoch=3, state=AckState.PREPARED), wall_now=1.0)
    assert "a" not in board.applied_at
    board.record(ack("a", epoch=4), wall_now=2.0)
    board.record(ack("a", epoch=4, state=AckState.SETTLED), wall_now=3.0)
    assert board.applied_at == {"a": 2.0}
    board.record(ack("a", epoch=5), wall_now=4.0)
    assert board.applied_at == {"a": 4.0}
