"""A round is told in the order in which it happened."""

from __future__ import annotations

from services.worker.news import News
from services.worker.pipeline.events import Committed, Settled
from shared.messages import TokenItem


def item(index: int) -> TokenItem:
    return TokenItem(request_id="r", attempt=0, index=index)


def test_items_that_are_older_than_events_come_in_a_part_of_their_own() -> None:
    news = News()
    news.add([item(0)], [])
    news.add([item(1)], [Committed(3)])
    news.add([item(2)], [])
    news.add([], [Settled(3)])
    assert [(list(events), [i.index for i in items]) for events, items in news.parts] == [
        ([], [0]),
        ([Committed(3)], [1, 2]),
        ([Settled(3)], []),
    ]


def test_a_round_that_brings_nothing_is_one_empty_part() -> None:
    news = News()
    news.add([], [])
    assert news.is_empty
    assert len(news.parts) == 1
    news.add([], [Settled(3)])
    assert not news.is_empty
