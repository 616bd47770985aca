"""The stream parser stamps tokens only, and calls an answer valid only if it is whole."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.client import LengthControl, PlannedRequest, StreamParser

PLANNED = PlannedRequest("a prompt", prompt_tokens=2, output_tokens=2)


def event(text: str = "", finish_reason: str | None = None, **fields: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"choices": [choice], **fields}).encode() + b"\n"


def feed(*lines: bytes) -> StreamParser:
    parser = StreamParser()
    for now, line in enumerate(lines):
        parser.feed(line, float(now))
    return parser


def test_only_chunks_with_text_are_tokens() -> None:
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 2}}\n'
    lines = [b": ping\n", event(""), b"\n", event("a"), event("b", "length"), usage]
    parser = feed(*lines, b"data: [DONE]\n")
    assert parser.chunk_times == [3.0, 4.0]
    assert parser.usage == {"prompt_tokens": 2, "completion_tokens": 2}
    assert parser.problem(PLANNED, LengthControl.IGNORE_EOS) == ""


def test_tokens_are_the_servers_count_where_it_gives_one() -> None:
    assert feed(event("two tokens", "stop", usage={"completion_tokens": 2})).output_tokens == 2
    assert feed(event("one"), event("two", "stop")).output_tokens == 2


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([event("a"), b"data: [DONE]\n"], "without a finish_reason"),
        ([event("a", "stop")], "1 output tokens instead of 2"),
        ([event("a"), b'data: {"error": {"message": "lost"}}\n'], "lost"),
    ],
)
def test_an_answer_that_is_not_whole_is_a_failure(lines: list[bytes], problem: str) -> None:
    assert problem in feed(*lines).problem(PLANNED, LengthControl.IGNORE_EOS)


def test_a_short_answer_is_valid_where_the_length_is_not_controlled() -> None:
    assert feed(event("a", "stop")).problem(PLANNED, LengthControl.NONE) == ""


def test_length_control_fields() -> None:
    assert LengthControl.IGNORE_EOS.fields(7) == {"ignore_eos": True, "min_tokens": 7}
    assert LengthControl.NONE.fields(7) == {}
    config = json.loads(LengthControl.GENERATION_CONFIG.fields(7)["generation_config"])
    assert config["max_new_tokens"] == 7
