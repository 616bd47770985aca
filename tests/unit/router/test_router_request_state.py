"""The state machine of a request: legal moves, numbering, gaps, attempts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.request_state import (
    IllegalTransitionError,
    RequestState,
    TokenStream,
    Verdict,
)
from shared.messages import FinishReason, TokenItem

TOKENS = tuple(range(100, 120))


def streaming() -> TokenStream:
    stream = TokenStream(0.0)
    stream.begin_attempt(0.0)
    stream.move(RequestState.DISPATCHING)
    stream.move(RequestState.STREAMING)
    return stream


def item(start: int, end: int, attempt: int = 1, finish: FinishReason | None = None) -> TokenItem:
    return TokenItem(
        request_id="r",
        attempt=attempt,
        index=start,
        token_ids=TOKENS[start:end],
        finish_reason=finish,
    )


def test_a_request_goes_from_queue_to_end() -> None:
    stream = streaming()
    stream.move(RequestState.FINISHED)
    assert stream.is_over


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], RequestState.STREAMING),
        ([], RequestState.LOST),
        ([RequestState.CANCELLED], RequestState.QUEUED),
        ([RequestState.DISPATCHING, RequestState.STREAMING], RequestState.QUEUED),
        ([RequestState.FINISHED], RequestState.FAILED),
    ],
)
def test_illegal_moves_are_refused(before: list[RequestState], after: RequestState) -> None:
    stream = TokenStream(0.0)
    for state in before:
        stream.move(state)
    with pytest.raises(IllegalTransitionError):
        stream.move(after)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), max_size=40))
def test_whatever_arrives_the_tokens_are_a_prefix_without_holes(
    spans: list[tuple[int, int]],
) -> None:
    stream = streaming()
    for start, length in spans:
        stream.accept(item(start, min(start + length, 20)), 1.0)
    received = tuple(stream.output_token_ids)
    assert received == TOKENS[: len(received)]
    assert [t for part in stream.take() for t in part.token_ids] == list(received)


def test_a_gap_is_seen_and_nothing_of_it_taken() -> None:
    stream = streaming()
    assert stream.accept(item(0, 2), 1.0) is Verdict.NEW
    assert stream.accept(item(3, 4), 1.0) is Verdict.GAP
    assert stream.has_gap
    assert stream.accept(item(1, 5), 1.0) is Verdict.NEW
    assert not stream.has_gap
    assert stream.output_token_ids == list(TOKENS[:5])


def test_repetitions_are_dropped() -> None:
    stream = streaming()
    stream.accept(item(0, 3), 1.0)
    assert stream.accept(item(0, 3), 1.0) is Verdict.DUPLICATE
    assert stream.accept(item(2, 3), 1.0) is Verdict.DUPLICATE
    assert stream.output_token_ids == list(TOKENS[:3])


def test_frames_of_an_older_attempt_are_void() -> None:
    stream = streaming()
    stream.accept(item(0, 2), 1.0)
    stream.move(RequestState.LOST)
    assert stream.accept(item(2, 3), 1.0) is Verdict.STALE
    stream.move(RequestState.QUEUED)
    stream.begin_attempt(2.0)
    stream.move(RequestState.DISPATCHING)
    assert stream.accept(item(2, 3, attempt=1), 2.0) is Verdict.STALE
    assert stream.accept(item(2, 3, attempt=2), 2.0) is Verdict.NEW
    assert stream.output_token_ids == list(TOKENS[:3])


def test_nothing_is_taken_after_the_end() -> None:
    stream = streaming()
    stream.accept(item(0, 2, finish=FinishReason.LENGTH), 1.0)
    assert stream.accept(item(2, 3), 1.0) is Verdict.STALE


def test_the_end_may_come_with_tokens_that_are_known() -> None:
    stream = streaming()
    stream.accept(item(0, 3), 1.0)
    assert stream.accept(item(2, 3, finish=FinishReason.STOP), 1.0) is Verdict.NEW
    assert stream.take()[-1].finish_reason is FinishReason.STOP
    assert stream.output_token_ids == list(TOKENS[:3])


@pytest.mark.parametrize("reason", [FinishReason.LOST, FinishReason.ABORT])
def test_the_end_of_an_attempt_is_not_that_of_the_request(reason: FinishReason) -> None:
    stream = streaming()
    stream.accept(item(0, 3), 1.0)
    assert stream.accept(item(3, 3, finish=reason), 2.0) is Verdict.NEW
    stream.move(RequestState.LOST)
    stream.move(RequestState.QUEUED)
    stream.begin_attempt(3.0)
    stream.move(RequestState.DISPATCHING)
    assert stream.accept(item(3, 4, attempt=2), 4.0) is Verdict.NEW


def test_lost_kv_ends_an_attempt_whatever_is_missing() -> None:
    """Its worker may not have the tokens of the gap any more."""
    stream = streaming()
    stream.accept(item(0, 3), 1.0)
    assert stream.accept(item(5, 6), 2.0) is Verdict.GAP
    assert stream.accept(item(0, 0, finish=FinishReason.LOST), 3.0) is Verdict.NEW
    assert not stream.has_gap
    assert stream.output_token_ids == list(TOKENS[:3])
