"""A captured stream is cut at event borders, wherever the network cut it, and faults are seen."""

from __future__ import annotations

import json

import pytest

from benchmarks.router_phase import events_between, hold_seconds, stream_problem
from benchmarks.sse_capture import Capture, StreamEvents, parse_capture


def event(text: str, finish_reason: str | None = None) -> bytes:
    fields = {"choices": [{"text": text, "finish_reason": finish_reason}]}
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


STREAM = event("0000412") + event(" the") + event(" river", "length") + b"data: [DONE]\n\n"


@pytest.mark.parametrize("size", [1, 5, 64, len(STREAM)])
def test_events_are_found_whatever_the_pieces(size: int) -> None:
    pieces = [
        (float(start // size), STREAM[start : start + size])
        for start in range(0, len(STREAM), size)
    ]
    events = parse_capture(Capture(sent_at=0.0, status=200, pieces=pieces))
    assert events.texts == ("0000412", " the", " river")
    assert list(events.times) == sorted(events.times)
    assert (events.finish_reason, events.problem) == ("length", "")


def test_an_event_has_the_time_of_the_piece_that_completed_it() -> None:
    first, second = event("a"), event("b")
    pieces = [(1.0, first + second[:4]), (2.0, second[4:])]
    assert parse_capture(Capture(0.0, 200, pieces)).times == (1.0, 2.0)


def test_refusals_and_errors_in_the_stream_are_problems() -> None:
    refused = parse_capture(Capture(0.0, 503, [(1.0, b'{"error": {"message": "busy"}}')]))
    assert "503" in refused.problem
    assert "busy" in refused.problem
    failed = event("a") + b'data: {"error": {"message": "lost"}}\n\n'
    assert "lost" in parse_capture(Capture(0.0, 200, [(1.0, failed)])).problem


def stream(*texts: str, finish_reason: str = "length", problem: str = "") -> StreamEvents:
    return StreamEvents(tuple(map(float, range(len(texts)))), texts, finish_reason, problem)


def test_a_whole_stream_has_no_problem() -> None:
    good = stream("0000412", " the", " river")
    assert stream_problem(good, " the river") == ""
    assert hold_seconds(good) == pytest.approx(0.000412)


@pytest.mark.parametrize(
    "bad",
    [
        stream("0000412", " the"),
        stream("0000412", " river", " the"),
        stream("0000412", " the", " the", " river"),
        stream("0000412", " the", " river", finish_reason=""),
        stream(problem="ClientPayloadError"),
        stream(),
    ],
)
def test_lost_repeated_swapped_or_unfinished_tokens_are_problems(bad: StreamEvents) -> None:
    assert stream_problem(bad, " the river")


def test_events_are_counted_in_a_half_open_window() -> None:
    assert events_between([stream("a", "b", "c"), stream("a", "b")], 1.0, 2.0) == 2
