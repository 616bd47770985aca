"""Who may leave a pipeline, and when."""

from __future__ import annotations

import pytest

from services.worker.draining import why_stay
from shared.layout import GroupPlan, MemberPlan, Span
from shared.messages import WorkerState
from tests.planner_support import worker_info

GROUP = GroupPlan(
    group_id="ab",
    epoch=1,
    members=(
        MemberPlan(worker_id="a", span=Span(start=0, end=2)),
        MemberPlan(worker_id="b", span=Span(start=2, end=4)),
    ),
)
READY, DRAINING = WorkerState.READY, WorkerState.DRAINING


@pytest.mark.parametrize(
    ("worker_id", "other", "num_streams", "group", "stays"),
    [
        ("a", READY, 0, None, False),
        ("a", READY, 1, None, True),
        ("a", READY, 0, GROUP, True),
        ("b", READY, 0, GROUP, True),
        ("a", DRAINING, 0, GROUP, False),
        ("a", DRAINING, 1, GROUP, True),
        ("b", DRAINING, 0, GROUP, True),
        ("a", None, 0, GROUP, False),
    ],
)
def test_who_stays(
    worker_id: str,
    other: WorkerState | None,
    num_streams: int,
    group: GroupPlan | None,
    stays: bool,
) -> None:
    peer = "b" if worker_id == "a" else "a"
    workers = {worker_id: worker_info(worker_id, state=DRAINING)}
    if other is not None:
        workers[peer] = worker_info(peer, state=other)
    assert bool(why_stay(worker_id, num_streams, group, workers)) == stays
