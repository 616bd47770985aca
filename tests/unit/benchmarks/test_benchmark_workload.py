"""Prompts have exactly the wanted length, and runs can be repeated from their seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from benchmarks.workload import TextPrompts, TokenIdPrompts, gamma_arrivals


class PairTokenizer:
    """Two characters a token, whatever they are."""

    def encode(self, text: str) -> list[int]:
        return [ord(a) * 256 + ord(b) for a, b in zip(text[::2], text[1::2], strict=True)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(token // 256) + chr(token % 256) for token in token_ids)


class OddTokenizer(PairTokenizer):
    """Never gives back a text of the length that was cut."""

    def encode(self, text: str) -> list[int]:
        return [0, *super().encode(text[: len(text) // 2 * 2])]


class EvenWords(PairTokenizer):
    def encode(self, text: str) -> list[int]:
        return super().encode(text if len(text) % 2 == 0 else text + " ")


@pytest.mark.parametrize("length", [1, 7, 128])
def test_text_prompts_have_the_wanted_number_of_tokens(length: int) -> None:
    prompts = TextPrompts(EvenWords())
    text = prompts.draw(random.Random(1), length)
    assert isinstance(text, str)
    assert len(EvenWords().encode(text)) == length


def test_a_tokenizer_that_cannot_be_cut_is_reported() -> None:
    with pytest.raises(ValueError, match="exactly 5 tokens"):
        TextPrompts(OddTokenizer()).draw(random.Random(1), 5)


def test_token_id_prompts_stay_in_the_vocabulary() -> None:
    prompt = TokenIdPrompts(range(17, 20)).draw(random.Random(1), 200)
    assert len(prompt) == 200
    assert set(prompt) == {17, 18, 19}


def test_a_seed_repeats_a_run_and_another_seed_does_not() -> None:
    prompts = TokenIdPrompts(range(49152))
    first = prompts.draw(random.Random(1), 128)
    assert prompts.draw(random.Random(1), 128) == first
    assert prompts.draw(random.Random(2), 128) != first


@pytest.mark.parametrize("shape", [0.25, 1.0])
def test_arrivals_rise_and_keep_the_mean_rate(shape: float) -> None:
    arrivals = gamma_arrivals(random.Random(3), 20_000, 5.0, shape=shape)
    assert arrivals == sorted(arrivals)
    assert len(arrivals) / arrivals[-1] == pytest.approx(5.0, rel=0.05)


def test_a_smaller_shape_is_burstier() -> None:
    def largest_gap(shape: float) -> float:
        arrivals = gamma_arrivals(random.Random(3), 5000, 5.0, shape=shape)
        return max(b - a for a, b in pairwise(arrivals))

    assert largest_gap(0.25) > 1.5 * largest_gap(1.0)


@pytest.mark.parametrize(("rate", "shape"), [(0.0, 1.0), (1.0, 0.0)])
def test_impossible_arrivals_are_refused(rate: float, shape: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        gamma_arrivals(random.Random(0), 3, rate, shape=shape)
