"""Background work takes a share of the time while batches run, and most of it while none do."""

from __future__ import annotations

import pytest

from services.worker.pipeline.work_pacer import WorkPacer

SHARE = 0.1


def simulate(gap_seconds: float, num_rounds: int = 50) -> float:
    """Share of the time spent on it where every round lasts `gap_seconds` without it."""
    now = working = 0.0
    pacer = WorkPacer(now, SHARE)
    for _ in range(num_rounds):
        now += gap_seconds
        for _ in range(2):  # before and after the batch of the round
            granted = pacer.grant(now)
            working += granted
            now += granted
            pacer.used(now)
    return working / now


@pytest.mark.parametrize("batch_seconds", [0.02, 0.05, 0.15])
def test_batches_lose_a_tenth_of_their_time(batch_seconds: float) -> None:
    assert 0.05 < simulate(batch_seconds) < 0.1


def test_an_idle_worker_works_most_of_the_time() -> None:
    assert simulate(0.001) > 0.6


def test_a_batch_of_seconds_does_not_make_a_pause_of_seconds() -> None:
    pacer = WorkPacer(0.0, SHARE)
    assert pacer.grant(10.0) <= 0.02
