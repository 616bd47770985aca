"""When a request ends by itself."""

from __future__ import annotations

from engine_helpers import make_request

from services.worker.engine.stopping import finish_reason, forbidden_token_ids
from shared.messages import FinishReason

EOS, STOP, PLAIN = 90, 91, 5
LONG = 1000


def test_eos_stops() -> None:
    request = make_request(eos_token_ids=(EOS,), output_token_ids=(PLAIN, EOS))
    assert finish_reason(request, LONG) is FinishReason.STOP


def test_ignored_eos_does_not_stop_but_stop_token_does() -> None:
    request = make_request(
        eos_token_ids=(EOS,), output_token_ids=(EOS,), ignore_eos=True, stop_token_ids=(STOP,)
    )
    assert finish_reason(request, LONG) is None
    request.output_token_ids.append(STOP)
    assert finish_reason(request, LONG) is FinishReason.STOP


def test_an_eos_in_the_prompt_does_not_stop() -> None:
    request = make_request(num_prompt_tokens=1, eos_token_ids=tuple(range(97)))
    assert finish_reason(request, LONG) is None


def test_max_tokens_and_model_length_end_with_length() -> None:
    request = make_request(num_prompt_tokens=4, output_token_ids=(1, 2), max_tokens=2)
    assert finish_reason(request, LONG) is FinishReason.LENGTH
    longer = make_request(num_prompt_tokens=4, output_token_ids=(1, 2), max_tokens=3)
    assert finish_reason(longer, LONG) is None
    assert finish_reason(longer, 6) is FinishReason.LENGTH


def test_a_stop_token_at_the_limit_counts_as_stop() -> None:
    request = make_request(eos_token_ids=(EOS,), output_token_ids=(1, EOS), max_tokens=2)
    assert finish_reason(request, LONG) is FinishReason.STOP


def test_before_min_tokens_nothing_stops_and_stop_tokens_are_forbidden() -> None:
    request = make_request(
        eos_token_ids=(EOS,), output_token_ids=(EOS,), min_tokens=2, stop_token_ids=(STOP,)
    )
    assert finish_reason(request, LONG) is None
    assert forbidden_token_ids(request, request.num_tokens) == (EOS, STOP)
    request.output_token_ids.append(EOS)
    assert finish_reason(request, LONG) is FinishReason.STOP
    assert forbidden_token_ids(request, request.num_tokens) == ()


def test_an_ignored_eos_is_not_forbidden() -> None:
    request = make_request(eos_token_ids=(EOS,), min_tokens=2, ignore_eos=True)
    assert forbidden_token_ids(request, request.num_tokens) == ()
