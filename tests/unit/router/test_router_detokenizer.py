"""Incremental decoding: whatever the tokens, the pieces are the text of all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from services.router.detokenizer import (
    ByteLevelDecoder,
    TextDecoder,
    WindowDecoder,
    byte_level_table,
)
from services.router.tokenizer import load_tokenizer
from tests.router_support import text_tokens, write_tiny_tokenizer

DecoderFactory = Callable[[bool], TextDecoder]
SPECIAL_IDS = frozenset({256, 257})


def tiny(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(write_tiny_tokenizer(directory) / "tokenizer.json"))


def byte_fallback() -> Tokenizer:
    """Like Llama 2: words with a leading U+2581, other characters as byte tokens."""
    words = ["<unk>", "\u2581the", "\u2581cat", "s", "\u2581", "é", "<s>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    vocabulary |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny(tmp_path_factory.mktemp("tiny"))


def decode_in_pieces(decoder: TextDecoder, token_ids: list[int]) -> list[str]:
    return [*(decoder.push(token_id) for token_id in token_ids), decoder.finish()]


@given(st.lists(st.integers(0, 257), max_size=60), st.booleans())
def test_byte_level_pieces_are_the_whole(
    byte_level: Tokenizer, token_ids: list[int], skip: bool
) -> None:
    whole = byte_level.decode(token_ids, skip_special_tokens=skip)
    table = byte_level_table(byte_level)
    decoder = ByteLevelDecoder(table, SPECIAL_IDS if skip else frozenset())
    assert "".join(decode_in_pieces(decoder, token_ids)) == whole
    window = WindowDecoder(byte_level, skip)
    assert "".join(decode_in_pieces(window, token_ids)) == whole


@given(st.text(max_size=40))
def test_text_never_shows_half_a_character(byte_level: Tokenizer, text: str) -> None:
    pieces = decode_in_pieces(
        ByteLevelDecoder(byte_level_table(byte_level), frozenset()), text_tokens(text)
    )
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.text(alphabet="the cats é🙂中", max_size=30), st.booleans())
def test_other_decoders_give_the_whole_text(text: str, skip: bool) -> None:
    tokenizer = byte_fallback()
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.decode(token_ids, skip_special_tokens=skip)
    assert "".join(decode_in_pieces(WindowDecoder(tokenizer, skip), token_ids)) == whole


def test_an_emoji_comes_whole_with_its_last_byte(byte_level: Tokenizer) -> None:
    decoder = ByteLevelDecoder(byte_level_table(byte_level), frozenset())
    assert decode_in_pieces(decoder, text_tokens("🙂")) == ["", "", "", "🙂", ""]


def test_the_tail_of_a_broken_character_is_a_replacement(byte_level: Tokenizer) -> None:
    decoder = ByteLevelDecoder(byte_level_table(byte_level), frozenset())
    assert decode_in_pieces(decoder, text_tokens("🙂")[:2]) == ["", "", "\ufffd"]


def test_ids_without_text_are_empty(byte_level: Tokenizer) -> None:
    decoder = ByteLevelDecoder(byte_level_table(byte_level), SPECIAL_IDS)
    assert decode_in_pieces(decoder, [256, ord("a"), 999_999, 257]) == ["", "a", "", "", ""]


def test_the_tokenizer_picks_the_decoder_of_the_model(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tiny_tokenizer(tmp_path))
    assert isinstance(tokenizer.new_decoder(skip_special_tokens=True), ByteLevelDecoder)
    assert tokenizer.facts.eos_token_ids == (257,)
    assert tokenizer.facts.max_model_len == 512
