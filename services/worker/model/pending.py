"""The tokens of a launched batch: where the model computes at once, on the host some time later."""

from __future__ import annotations

from typing import Protocol

import torch

from services.worker.model.sampler import SampledToken


class PendingTokens(Protocol):
    """What a launch returns; nobody has waited for anything yet."""

    @property
    def token_ids(self) -> torch.Tensor:  # [rows] int64
        """The tokens where the model computes, for a launch that goes on from them."""
        ...

    @property
    def is_ready(self) -> bool:
        """True if `result` does not wait."""
        ...

    def result(self) -> list[SampledToken]:
        """The tokens, one for each row; waits for them. Raises whatever went wrong."""
        ...


class KnownTokens:
    """Implements `PendingTokens` where everything is computed at once."""

    is_ready = True

    def __init__(self, tokens: list[SampledToken]) -> None:
        self._tokens = tokens

    @property
    def token_ids(self) -> torch.Tensor:  # [rows] int64
        """The tokens."""
        return torch.tensor([token.token_id for token in self._tokens], dtype=torch.int64)

    def result(self) -> list[SampledToken]:
        """The tokens."""
        return self._tokens
