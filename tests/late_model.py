"""A model whose tokens come late, as those of a device that computes by itself: around any model.

is_ready   False, False, ... True     after so many looks
result     at any time, as if the device had just been waited for
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from services.worker.core import Model
from services.worker.model.batch import UNKNOWN_TOKEN, SequenceSlice
from services.worker.model.pending import PendingTokens
from services.worker.model.runner import ModelRunner
from services.worker.model.sampler import SampledToken, SamplingRow


@dataclass
class LateTokens:
    """Implements `PendingTokens`: not ready until it was looked at so many times, or waited for."""

    tokens: list[SampledToken]
    num_looks: int
    error: Exception | None = None
    is_taken: bool = False

    @property
    def token_ids(self) -> torch.Tensor:  # [rows] int64
        return torch.tensor([token.token_id for token in self.tokens])

    @property
    def is_ready(self) -> bool:
        self.num_looks -= 1
        return self.num_looks < 0

    def result(self) -> list[SampledToken]:
        assert not self.is_taken
        self.is_taken = True
        if self.error is not None:
            raise self.error
        return self.tokens


class LateModel:
    """Implements `Model`; fills in what its source sampled, as a device does.

    Attributes:
        num_ahead: launches while the one before had not been taken in.
        launched: all of them.
    """

    def __init__(self, model: Model, num_looks: Callable[[], int] = lambda: 1000) -> None:
        """Compute with `model`, at once; nobody is told before `num_looks()` looks."""
        self.num_ahead = 0
        self.launched: list[LateTokens] = []
        self._model = model
        self._num_looks = num_looks

    def launch(
        self,
        slices: Sequence[SequenceSlice],
        rows: Sequence[SamplingRow],
        source: PendingTokens | None,
    ) -> LateTokens:
        known: list[SampledToken] = []
        if source is not None:
            assert source is self.launched[-1]
            assert not self.launched[-1].is_taken
            known = self.launched[-1].tokens
        assert all(each.is_taken for each in self.launched[:-1])
        self.num_ahead += source is not None
        complete = [_slice(item, known) for item in slices], [_row(row, known) for row in rows]
        tokens = self._model.launch(*complete, None).result()
        self.launched.append(LateTokens(tokens, self._num_looks()))
        return self.launched[-1]


def delay_samples(runner: ModelRunner, num_looks: Callable[[], int]) -> None:
    """Let the tokens that `runner` samples for others come late."""
    sample = runner.sample

    def late(*arguments: Any) -> LateTokens:
        return LateTokens(sample(*arguments).result(), num_looks())

    runner.sample = late  # type: ignore[method-assign]


def _slice(item: SequenceSlice, known: Sequence[SampledToken]) -> SequenceSlice:
    if item.source_row is None:
        return item
    assert item.token_ids[-1] == UNKNOWN_TOKEN
    token_ids = [*item.token_ids[:-1], known[item.source_row].token_id]
    return replace(item, token_ids=token_ids, source_row=None)


def _row(row: SamplingRow, known: Sequence[SampledToken]) -> SamplingRow:
    if row.source_row is None:
        return row
    output_token_ids = [*row.output_token_ids, known[row.source_row].token_id]
    return replace(row, output_token_ids=output_token_ids, source_row=None)
