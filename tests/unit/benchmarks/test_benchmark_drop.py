"""What the drop benchmark makes of the times of tokens and phases."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.drop import render_drop, render_restore
from benchmarks.drop_measure import DropFinding, gaps, tpots

TIMES = {"a": [1.0, 1.5, 2.5, 4.0], "b": [2.0]}
FINDING = DropFinding(
    commit=[0.001, 0.002],
    commit_bytes=200 * 1024 * 1024,
    hand_over=0.02,
    first_batch=0.05,
    first_token=0.1,
    queued_token=0.2,
    iteration=0.05,
    exchange=0.5,
    exchange_bytes=80e6,
    load=[1.0, 2.0],
    load_bytes=200 * 1024 * 1024,
    source_bytes={"checkpoint": 100e6, "peer": 100e6},
    source_seconds={"checkpoint": 1.0, "peer": 2.0},
    undisturbed_gaps=[0.05, 0.06],
    restoring_gaps=[0.07],
    returning_gaps=[0.08],
    undisturbed_tpots=[0.05],
    restore_tpots=[0.06],
)


def test_gaps_belong_to_the_window_of_their_later_token() -> None:
    assert gaps(TIMES, ["a", "b"], 1.5, 4.0) == [0.5, 1.0]


def test_a_stream_without_gaps_has_no_tpot() -> None:
    assert tpots(TIMES, ["a", "b"], 0.0, 10.0) == [1.0]


def test_the_drop_table_has_a_column_for_each_run() -> None:
    lines = render_drop([FINDING, FINDING]).splitlines()
    assert {line.count("|") for line in lines} == {4}
    assert any("commit to usable blocks" in line and line.count("2.00") == 2 for line in lines)


@pytest.mark.parametrize(("restored", "ratio"), [(0.05, "1.00"), (0.06, "1.20")])
def test_the_restore_table_compares_with_the_undisturbed(restored: float, ratio: str) -> None:
    finding = dataclasses.replace(FINDING, restore_tpots=[restored])
    assert ratio in render_restore([finding])
