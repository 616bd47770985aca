"""What a load run sends and when: prompts of an exact token length, arrival times. Pure.

Both come from a seeded `random.Random`, so a run can be repeated with its printed seed, and a fresh
seed gives prompts that no earlier run has left in a prefix cache.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

#: A completion prompt: text, or token ids where the server takes them.
Prompt = str | list[int]

_WORDS = """
    river stone market garden winter engine letter silver window forest bridge teacher
    island candle harbour mountain paper summer library station doctor village kitchen
    morning travel history science picture animal country number evening corner farmer
    ocean signal weather planet family record yellow simple honest quiet early modern
    gentle narrow bright distant walks carries follows opens builds remembers finds keeps
    writes watches learns answers under behind between around without toward because
    although before after while beyond
"""


class Tokenizer(Protocol):
    """What is needed of a tokenizer; `benchmarks.tokenizer` reads one from a model directory."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens not added."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`."""
        ...


class PromptSource(Protocol):
    """Draws prompts of a given length."""

    def draw(self, rng: random.Random, num_tokens: int) -> Prompt:
        """A fresh prompt of exactly `num_tokens` tokens."""
        ...


@dataclass(frozen=True, slots=True)
class TokenIdPrompts:
    """Random token ids of the half-open range `vocab`."""

    vocab: range

    def draw(self, rng: random.Random, num_tokens: int) -> Prompt:
        return rng.choices(self.vocab, k=num_tokens)


@dataclass(frozen=True, slots=True)
class TextPrompts:
    """Random words, cut so that the tokenizer turns them into exactly the wanted length."""

    tokenizer: Tokenizer

    def draw(self, rng: random.Random, num_tokens: int) -> Prompt:
        """Raises ValueError where no cut of the words drawn has that length."""
        vocabulary = _WORDS.split()
        for _ in range(100):
            words = " ".join(rng.choices(vocabulary, k=num_tokens))
            text = self.tokenizer.decode(self.tokenizer.encode(words)[:num_tokens])
            if len(self.tokenizer.encode(text)) == num_tokens:
                return text
        raise ValueError(f"the tokenizer gives no text of exactly {num_tokens} tokens")


def gamma_arrivals(
    rng: random.Random, count: int, per_second: float, *, shape: float
) -> list[float]:
    """Arrival times in seconds from the start, `count` of them, with gamma-distributed gaps.

    A `shape` of 1 is a Poisson process, a smaller one is burstier: BurstGPT's requests fit
    0.25 to 0.5 (arXiv 2401.17644). Raises ValueError for a rate or shape that is not positive.
    """
    if per_second <= 0 or shape <= 0:
        raise ValueError(f"rate {per_second} and shape {shape} must be positive")
    arrivals: list[float] = []
    now = 0.0
    for _ in range(count):
        now += rng.gammavariate(shape, 1 / (shape * per_second))
        arrivals.append(now)
    return arrivals
