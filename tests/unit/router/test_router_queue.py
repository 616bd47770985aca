"""The waiting queue: order, bounds, and replays in front."""

from __future__ import annotations

import pytest

from services.router.errors import OverloadedError
from services.router.queue import WaitingQueue


def test_first_come_first_served_and_the_next_is_woken() -> None:
    queue = WaitingQueue(10, 1000)
    first, second = (queue.enter(1, is_replay=False) for _ in range(2))
    assert queue.is_head(first)
    queue.wake_head()
    assert first.news.is_set()
    assert not second.news.is_set()
    queue.leave(first)
    assert queue.is_head(second)
    assert second.news.is_set()


def test_requests_and_tokens_are_bounded() -> None:
    queue = WaitingQueue(2, 100)
    queue.enter(60, is_replay=False)
    with pytest.raises(OverloadedError):
        queue.enter(41, is_replay=False)
    queue.enter(40, is_replay=False)
    with pytest.raises(OverloadedError):
        queue.enter(0, is_replay=False)


def test_a_single_large_prompt_may_wait() -> None:
    queue = WaitingQueue(2, 100)
    queue.enter(5000, is_replay=False)
    assert queue.num_tokens == 5000


def test_a_replay_goes_to_the_front_of_a_full_queue() -> None:
    queue = WaitingQueue(1, 100)
    queue.enter(100, is_replay=False)
    replay = queue.enter(100, is_replay=True)
    assert queue.is_head(replay)
    assert len(queue) == 2
