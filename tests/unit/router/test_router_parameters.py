"""From a request's body to the worker's parameters: defaults, limits, refusals."""

from __future__ import annotations

from typing import Any

import pytest

from services.router.api.body import parse_object, validate_body
from services.router.api.sampling import build_sampling, resolve_max_tokens
from services.router.api.schemas import ChatCompletionRequest, CompletionRequest
from services.router.api.unsupported import refuse_unsupported
from services.router.errors import BadRequestError
from shared.sampling import SamplingParams


def sampling(body: dict[str, Any], defaults: dict[str, float] | None = None) -> SamplingParams:
    request = validate_body({"prompt": "a", **body}, CompletionRequest)
    return build_sampling(
        request, max_tokens=50, logprobs=None, defaults=defaults or {}, vocab_size=100
    )


def test_openai_defaults() -> None:
    params = sampling({})
    assert (params.temperature, params.top_p, params.top_k) == (1.0, 1.0, 0)
    assert params.max_tokens == 50


def test_the_models_defaults_hold_where_the_request_says_nothing() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 40}
    params = sampling({"temperature": 0.0}, defaults)
    assert (params.temperature, params.top_p, params.top_k) == (0.0, 0.9, 40)


def test_a_seed_is_drawn_once_and_kept_when_given() -> None:
    assert sampling({"seed": 7}).seed == 7
    assert sampling({"seed": -1}).seed >= 0
    assert len({sampling({}).seed for _ in range(5)}) == 5


def test_top_k_minus_one_keeps_everything() -> None:
    assert sampling({"top_k": -1}).top_k == 0


def test_bias_keys_become_token_ids() -> None:
    assert sampling({"logit_bias": {"7": -100}}).logit_bias == {7: -100.0}


@pytest.mark.parametrize(
    ("asked", "default", "room"), [(None, 16, 16), (None, None, 90), (None, 500, 90), (90, 16, 90)]
)
def test_output_length(asked: int | None, default: int | None, room: int) -> None:
    assert resolve_max_tokens(10, asked, default, limit=100) == room


@pytest.mark.parametrize(("prompt", "asked"), [(100, None), (101, 1), (99, 2)])
def test_output_that_does_not_fit_is_refused(prompt: int, asked: int | None) -> None:
    with pytest.raises(BadRequestError):
        resolve_max_tokens(prompt, asked, 16, limit=100)


@pytest.mark.parametrize(
    "body",
    [
        {"n": 1, "best_of": 1, "tools": [], "tool_choice": "none", "functions": []},
        {"response_format": {"type": "text"}, "modalities": ["text"], "suffix": ""},
        {"use_beam_search": False, "anything": "else"},
    ],
)
def test_values_that_ask_for_nothing_pass(body: dict[str, Any]) -> None:
    refuse_unsupported(body)


@pytest.mark.parametrize(
    "body",
    [{"n": 0}, {"n": True}, {"n": "1"}, {"guided_json": {"a": 1}}, {"suffix": "x"}, {"tools": 1}],
)
def test_the_unsupported_is_refused_by_name(body: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError) as caught:
        refuse_unsupported(body)
    assert caught.value.param in body


def test_text_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "user", "content": parts, "name": "bob"}]}
    (message,) = validate_body(body, ChatCompletionRequest).messages
    assert message.for_template() == {"role": "user", "content": "a\nb", "name": "bob"}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_of_every_form(prompt: object, expected: list[object]) -> None:
    assert validate_body({"prompt": prompt}, CompletionRequest).prompts() == expected


def test_null_means_absent() -> None:
    assert parse_object(b'{"a": null, "b": 1}') == {"b": 1}


def test_surrogate_pairs_are_text_and_halves_are_not() -> None:
    assert parse_object(b'{"a": "\\ud83d\\ude42"}') == {"a": "🙂"}
    with pytest.raises(BadRequestError):
        parse_object(b'{"a": "\\ud83d"}')
