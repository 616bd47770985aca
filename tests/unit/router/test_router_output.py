"""Token items to deltas: counts, stop strings and stop tokens, however the items are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.api.output import OutputOptions, OutputProcessor, merge_deltas
from services.router.tokenizer import ModelTokenizer, load_tokenizer
from shared.messages import FinishReason, TokenItem
from tests.router_support import EOS_ID, text_tokens, write_tiny_tokenizer

TEXT = "one two 🙂 three"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    directory: Path = tmp_path_factory.mktemp("tiny")
    return load_tokenizer(write_tiny_tokenizer(directory))


def items(token_ids: list[int], cuts: list[int], reason: FinishReason) -> list[TokenItem]:
    ends = sorted({*(cut for cut in cuts if 0 < cut < len(token_ids)), len(token_ids)})
    starts = [0, *ends[:-1]]
    return [
        TokenItem(
            request_id="r",
            attempt=1,
            index=start,
            token_ids=tuple(token_ids[start:end]),
            finish_reason=reason if end == len(token_ids) else None,
        )
        for start, end in zip(starts, ends, strict=True)
    ]


def run(
    tokenizer: ModelTokenizer, options: OutputOptions, parts: list[TokenItem]
) -> tuple[str, FinishReason | None, str | int | None, int]:
    processor = OutputProcessor(tokenizer, options)
    deltas = []
    for part in parts:
        deltas.append(processor.push(part))
        if deltas[-1].finish_reason is not None:
            break
    merged = merge_deltas(deltas)
    assert len(merged.token_ids) == processor.num_tokens
    return merged.text, merged.finish_reason, merged.stop_reason, processor.num_tokens


CUTS = st.lists(st.integers(1, 20), max_size=5)


@given(CUTS)
def test_the_end_of_sequence_counts_and_is_not_shown(
    tokenizer: ModelTokenizer, cuts: list[int]
) -> None:
    token_ids = [*text_tokens(TEXT), EOS_ID]
    parts = items(token_ids, cuts, FinishReason.STOP)
    assert run(tokenizer, OutputOptions(), parts) == (
        TEXT,
        FinishReason.STOP,
        None,
        len(token_ids),
    )


@given(CUTS)
def test_a_stop_string_is_found_wherever_items_are_cut(
    tokenizer: ModelTokenizer, cuts: list[int]
) -> None:
    parts = items(text_tokens(TEXT), cuts, FinishReason.LENGTH)
    options = OutputOptions(stop=("🙂", "zzz"))
    num_tokens = len("one two 🙂".encode())
    assert run(tokenizer, options, parts) == ("one two ", FinishReason.STOP, "🙂", num_tokens)


@given(CUTS)
def test_text_held_for_a_stop_string_comes_at_the_end(
    tokenizer: ModelTokenizer, cuts: list[int]
) -> None:
    parts = items(text_tokens(TEXT), cuts, FinishReason.LENGTH)
    text, reason, _, _ = run(tokenizer, OutputOptions(stop=("threee",)), parts)
    assert (text, reason) == (TEXT, FinishReason.LENGTH)


def test_stop_strings_wait_for_min_tokens(tokenizer: ModelTokenizer) -> None:
    parts = items(text_tokens("stop stop"), [], FinishReason.LENGTH)
    options = OutputOptions(stop=("stop",), min_tokens=4)
    assert run(tokenizer, options, parts)[0] == "stop "


def test_a_stop_token_is_the_reason_only_if_asked_for(tokenizer: ModelTokenizer) -> None:
    (part,) = items(text_tokens("ab"), [], FinishReason.STOP)
    part = part.model_copy(update={"stop_token_id": ord("b")})
    asked = OutputOptions(stop_token_ids=frozenset({ord("b")}))
    assert run(tokenizer, asked, [part])[:3] == ("a", FinishReason.STOP, ord("b"))
    assert run(tokenizer, OutputOptions(), [part])[2] is None


def test_half_a_character_at_the_end_is_a_replacement(tokenizer: ModelTokenizer) -> None:
    parts = items(text_tokens("a🙂")[:3], [1, 2], FinishReason.LENGTH)
    assert run(tokenizer, OutputOptions(), parts)[0] == "a\ufffd"
