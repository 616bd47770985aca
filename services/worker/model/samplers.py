"""Who chooses the tokens of a batch: row after row on the CPU, all at once on a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from services.worker.model.device_sampler import DeviceSampler
from services.worker.model.pending import KnownTokens, PendingTokens
from services.worker.model.queues.base import DeviceQueue
from services.worker.model.queues.host import HostQueue
from services.worker.model.sampler import SamplingRow, sample


class Sampler(Protocol):
    """Chooses tokens. Engine thread only."""

    def launch(
        self,
        logits: Iterable[torch.Tensor],  # each [part, vocab] float32; may be overwritten
        parts: Sequence[Sequence[SamplingRow]],
        source_ids: torch.Tensor | None,  # [rows of the launch before] int64
    ) -> PendingTokens:
        """Draw one token per row. Log-probabilities are those before penalties and temperature.

        Args:
            logits: a few rows at once, computed one part after the other.
            source_ids: the tokens of the launch before; needed where a row has a `source_row`.
        """
        ...


class HostSampler:
    """Implements `Sampler` on the CPU, where nothing is launched ahead: every row is known."""

    def launch(
        self,
        logits: Iterable[torch.Tensor],  # each [part, vocab] float32
        parts: Sequence[Sequence[SamplingRow]],
        source_ids: torch.Tensor | None,
    ) -> KnownTokens:
        """Draw one token per row, now."""
        tokens = [
            token for part, rows in zip(logits, parts, strict=True) for token in sample(part, rows)
        ]
        return KnownTokens(tokens)


def make_sampler(queue: DeviceQueue, vocab_size: int) -> Sampler:
    """The one for the device behind `queue`."""
    return HostSampler() if isinstance(queue, HostQueue) else DeviceSampler(queue, vocab_size)
