"""A request's life cycle and what is derived from its tokens."""

from __future__ import annotations

import pytest
from engine_helpers import make_request
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.request import (
    TRANSITIONS,
    IllegalTransitionError,
    RequestStatus,
)


def test_every_status_has_its_transitions() -> None:
    assert set(TRANSITIONS) == set(RequestStatus)


def test_exactly_the_finished_states_are_final() -> None:
    final = {status for status in RequestStatus if status.is_finished}
    assert final == {status for status in RequestStatus if status.name.startswith("FINISHED")}


def test_an_illegal_transition_is_refused_and_changes_nothing() -> None:
    request = make_request()
    with pytest.raises(IllegalTransitionError, match="WAITING to PREEMPTED"):
        request.transition(RequestStatus.PREEMPTED)
    assert request.status is RequestStatus.WAITING


@given(
    st.integers(1, 12),
    st.lists(st.integers(0, 96), max_size=12),
    st.integers(0, 24),
    st.integers(0, 24),
)
def test_token_ids_are_a_slice_of_prompt_and_output(
    num_prompt_tokens: int, outputs: list[int], start: int, length: int
) -> None:
    request = make_request(num_prompt_tokens=num_prompt_tokens, output_token_ids=tuple(outputs))
    end = min(start + length, request.num_tokens)
    start = min(start, end)
    assert request.token_ids(start, end) == (request.prompt_token_ids + outputs)[start:end]


def test_queued_seconds_are_known_once_scheduled() -> None:
    request = make_request(arrival_seconds=3.0)
    assert request.queued_seconds is None
    request.first_scheduled_seconds = 5.5
    assert request.queued_seconds == 2.5
