"""Background work takes its share of the time while batches run, and most of it while none do."""

from __future__ import annotations

import pytest

from services.worker.work_pacer import BatchActivity, WorkPacer

SHARE = 0.1
PIECE_SECONDS = 0.0006  # work cannot stop within a piece


def simulate(gap_seconds: float, batch_seconds: float, num_rounds: int = 400) -> float:
    """Share of the time spent on it where every round lasts `gap_seconds` without it."""
    now = working = 0.0
    activity = BatchActivity()
    pacer = WorkPacer(now, SHARE, activity)
    for _ in range(num_rounds):
        now += gap_seconds
        if batch_seconds:
            activity.ran(batch_seconds, now)
        for _ in range(2):  # before and after the batch of the round
            granted = pacer.grant(now)
            spent = -(-granted // PIECE_SECONDS) * PIECE_SECONDS
            working += spent
            now += spent
            pacer.used(now)
    return working / now


@pytest.mark.parametrize("batch_seconds", [0.001, 0.005, 0.02, 0.15])
def test_batches_lose_no_more_than_the_share(batch_seconds: float) -> None:
    assert SHARE / 2 < simulate(batch_seconds, batch_seconds) < SHARE * 1.1


def test_a_stage_that_waits_for_others_is_not_idle() -> None:
    assert simulate(0.02, 0.01) < SHARE * 1.1


def test_an_idle_worker_works_most_of_the_time() -> None:
    assert simulate(0.001, 0.0) > 0.6


def test_a_batch_of_seconds_does_not_make_a_pause_of_seconds() -> None:
    activity = BatchActivity()
    activity.ran(10.0, 10.0)
    assert WorkPacer(0.0, SHARE, activity).grant(10.0) <= 0.02


def test_while_a_device_computes_a_worker_is_not_idle_however_long_it_takes() -> None:
    activity = BatchActivity()
    activity.is_running = True
    assert WorkPacer(0.0, SHARE, activity).grant(0.0) == 0.0
    assert not activity.is_idle(100.0)
    activity.is_running = False
    assert activity.is_idle(100.0)


def test_in_a_bubble_there_is_time_for_a_piece_that_costs_nothing() -> None:
    activity = BatchActivity()
    pacer = WorkPacer(0.0, SHARE, activity)
    activity.ran(1.0, 0.0)
    activity.is_awaited = True
    for now in (0.0001, 0.0008, 0.0015):
        assert 0.0 < pacer.grant(now) <= PIECE_SECONDS
        pacer.used(now + PIECE_SECONDS)
    activity.is_awaited = False
    assert pacer.grant(0.0105) > 0.0  # the share of all that time is still there
    activity.is_awaited = activity.is_running = True
    pacer.used(0.02)
    assert pacer.grant(0.02) == 0.0  # the device computes


def test_work_that_took_too_long_is_made_up_for() -> None:
    activity = BatchActivity()
    pacer = WorkPacer(0.0, SHARE, activity)
    activity.ran(1.0, 1.0)
    assert pacer.grant(1.0) > 0.0
    pacer.used(1.03)
    assert pacer.grant(1.04) == 0.0
