"""Epoch fencing: what is older than the receiver's epoch is stale, whoever sends it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.worker.links.fence import Fence, FenceVerdict


def test_frames_of_a_known_group() -> None:
    fence = Fence()
    fence.advance("g", 5)
    verdicts = [fence.judge("g", epoch) for epoch in (4, 5, 6)]
    assert verdicts == [FenceVerdict.STALE, FenceVerdict.CURRENT, FenceVerdict.AHEAD]


def test_an_older_plan_changes_nothing() -> None:
    fence = Fence()
    fence.advance("g", 5)
    fence.advance("g", 3)
    assert fence.judge("g", 3) is FenceVerdict.STALE
    assert fence.judge("g", 5) is FenceVerdict.CURRENT


def test_a_group_that_was_untouched_keeps_its_epoch() -> None:
    fence = Fence()
    fence.advance("g", 5)
    fence.advance("other", 9)
    assert fence.judge("g", 5) is FenceVerdict.CURRENT


def test_a_group_that_is_over_is_stale() -> None:
    fence = Fence()
    fence.advance("g", 5)
    fence.retire("g")
    fence.retire("g")
    assert fence.judge("g", 5) is FenceVerdict.STALE
    assert fence.judge("new", 6) is FenceVerdict.AHEAD


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 20)), min_size=1))
def test_epochs_only_rise(plans: list[tuple[str, int]]) -> None:
    fence, newest = Fence(), dict[str, int]()
    for group_id, epoch in plans:
        fence.advance(group_id, epoch)
        newest[group_id] = max(epoch, newest.get(group_id, 0))
        for known, own in newest.items():
            assert fence.judge(known, own) is FenceVerdict.CURRENT
            assert fence.judge(known, own - 1) is FenceVerdict.STALE
