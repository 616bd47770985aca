"""A stub stream is a correct stream: indices without gaps, exact length, one end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.stub_engine import NUM_HOLD_DIGITS, StubEngine, StubVocabulary
from shared.messages import FinishReason, GenerateRequest, TokenItem
from shared.sampling import SamplingParams

VOCABULARY = StubVocabulary(digits=tuple(range(100, 110)), words=(7, 8, 9))


def request(max_tokens: int, name: str = "r", router: str = "router-a") -> GenerateRequest:
    return GenerateRequest(
        request_id=name,
        router_id=router,
        attempt=3,
        group_id="g",
        epoch=1,
        dispatch_number=1,
        prompt_token_ids=b"",
        sampling=SamplingParams(max_tokens=max_tokens),
    )


def test_the_first_item_says_how_long_the_request_was_held() -> None:
    item = StubEngine(VOCABULARY).start(request(20), hold_seconds=0.000412)
    assert [token - 100 for token in item.token_ids] == [0, 0, 0, 0, 4, 1, 2]
    assert (item.index, item.attempt, item.finish_reason) == (0, 3, None)


def test_a_hold_too_long_for_its_digits_saturates() -> None:
    assert VOCABULARY.hold_tokens(1e6) == (109,) * NUM_HOLD_DIGITS


@given(st.integers(1, 40))
def test_a_stream_has_exactly_max_tokens_and_ends_once(max_tokens: int) -> None:
    engine = StubEngine(VOCABULARY)
    items: list[TokenItem] = [engine.start(request(max_tokens), 0.0)]
    for _ in range(max_tokens):
        items += engine.step().get("router-a", [])
    position = 0
    for item in items:
        assert item.index == position
        position += len(item.token_ids)
    assert position == max_tokens
    assert [item.finish_reason for item in items[:-1]] == [None] * (len(items) - 1)
    assert items[-1].finish_reason is FinishReason.LENGTH
    assert engine.num_streams == 0


def test_items_go_to_the_router_that_asked() -> None:
    engine = StubEngine(VOCABULARY)
    engine.start(request(20, "x", "router-a"), 0.0)
    engine.start(request(20, "y", "router-b"), 0.0)
    step = engine.step()
    assert [item.request_id for item in step["router-a"]] == ["x"]
    assert [item.request_id for item in step["router-b"]] == ["y"]


def test_resume_repeats_what_was_sent() -> None:
    engine = StubEngine(VOCABULARY)
    tokens = list(engine.start(request(40), 0.25).token_ids)
    for _ in range(5):
        tokens += engine.step()["router-a"][0].token_ids
    item = engine.resume("r", num_received=3)
    assert item is not None
    assert item.index == 3
    assert list(item.token_ids) == tokens[3:]


def test_a_cancelled_stream_is_unknown() -> None:
    engine = StubEngine(VOCABULARY)
    engine.start(request(40), 0.0)
    engine.cancel("r")
    engine.cancel("r")
    assert engine.step() == {}
    assert engine.resume("r", 0) is None
    assert engine.router_of("r") is None
