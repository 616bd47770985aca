"""The stream table: what was said can be said again, and only to whom it concerns."""

from __future__ import annotations

from services.worker.pipeline.peers import GroupKey
from services.worker.streams import REMEMBER_SECONDS, StreamKey, StreamTable
from shared.messages import FinishReason, TokenItem


def item(index: int, *tokens: int, request_id: str = "a", attempt: int = 0) -> TokenItem:
    return TokenItem(request_id=request_id, attempt=attempt, index=index, token_ids=tokens)


def last(index: int, request_id: str = "a") -> TokenItem:
    return TokenItem(
        request_id=request_id, attempt=0, index=index, finish_reason=FinishReason.LENGTH
    )


def table_with(*request_ids: str) -> StreamTable:
    table = StreamTable()
    for request_id in request_ids:
        table.open(request_id, 0, f"router-of-{request_id}")
    return table


def test_items_go_to_the_router_that_asked() -> None:
    table = table_with("a", "b")
    sorted_items = table.record([item(0, 1), item(0, 2, request_id="b")], now=0.0)
    assert sorted_items == {
        "router-of-a": [item(0, 1)],
        "router-of-b": [item(0, 2, request_id="b")],
    }


def test_items_of_unknown_requests_and_replaced_attempts_go_nowhere() -> None:
    table = table_with("a")
    table.open("a", 1, "router-of-a")
    assert table.record([item(0, 1), item(0, 1, request_id="x")], now=0.0) == {}


def test_tokens_can_be_had_again_from_any_index() -> None:
    table = table_with("a")
    table.record([item(0, 5), item(1, 6), item(2, 7)], now=0.0)
    assert table.items_since("a", 0, 0) == [item(0, 5), item(1, 6), item(2, 7)]
    assert table.items_since("a", 0, 2) == [item(2, 7)]
    assert table.items_since("a", 0, 3) == []


def test_the_end_is_told_again_even_where_no_token_is_missing() -> None:
    table = table_with("a")
    table.record([item(0, 5), last(1)], now=0.0)
    assert table.items_since("a", 0, 1) == [last(1)]


def test_unknown_streams_are_said_to_be_unknown() -> None:
    table = table_with("a")
    assert table.items_since("b", 0, 0) is None
    assert table.items_since("a", 1, 0) is None


def test_a_finished_stream_takes_nothing_more() -> None:
    table = table_with("a")
    table.record([last(0)], now=0.0)
    assert table.record([item(0, 1)], now=0.0) == {}
    assert not table.is_open("a", 0)
    assert table.num_open == 0


def test_finished_streams_are_forgotten_after_a_while() -> None:
    table = table_with("a", "b")
    table.record([last(0)], now=10.0)
    table.forget_finished(now=10.0 + REMEMBER_SECONDS - 1)
    assert table.items_since("a", 0, 0) is not None
    table.forget_finished(now=10.0 + REMEMBER_SECONDS)
    assert table.items_since("a", 0, 0) is None
    assert table.is_open("b", 0)


def test_open_streams_of_a_router() -> None:
    table = table_with("a", "b")
    table.open("c", 2, "router-of-a")
    table.record([last(0)], now=0.0)
    assert table.open_streams_of("router-of-a") == [StreamKey("c", 2)]
    assert table.routers() == {"router-of-a", "router-of-b"}


def test_streams_that_moved_within_a_broken_group_are_lost() -> None:
    """Whoever serves them may have died before any router heard of it."""
    table = table_with("a", "b", "c")
    group, other = GroupKey("g", 1), GroupKey("g", 2)
    table.record([item(0, 5)], now=0.0)
    assert table.move("a", 0, "leader", group, now=1.0) == [item(0, 5)]
    table.move("b", 0, "leader", other, now=1.0)
    lost = TokenItem(request_id="a", attempt=0, index=0, finish_reason=FinishReason.LOST)
    assert table.lose_moved(group, now=2.0) == {"router-of-a": [lost]}
    assert table.lose_moved(group, now=3.0) == {}
    assert (table.moved_to("a", 0), table.moved_to("b", 0)) == ("", "leader")
    assert table.items_since("a", 0, 1) == [lost], "to be said again if that word gets lost"
    assert table.num_open == 1
