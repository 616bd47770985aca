"""Choosing tokens on a GPU: all rows of the logits at once, and nothing waits for the device.

The rules and the noise are those of `sampler.py`: the same request draws the same tokens on both,
as far as the last bits of its logits agree. What is done in which order is in `sampling_steps.py`.

    host     rows --> steps, their arrays                          tokens, log-probabilities
                            | one copy                                   ^ waited for later
    device   logits ------> steps of each part ---> tokens [rows] -------'
                                                      '--> the next launch
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from services.worker.model.queues.base import DeviceQueue, Fetch
from services.worker.model.sampler import SampledToken, SamplingRow
from services.worker.model.sampling_steps import Part, sampling_steps
from shared.messages import TokenLogprobs


@dataclass(frozen=True, slots=True)
class DeviceTokens:
    """Implements `PendingTokens` for tokens on their way to the host.

    Attributes:
        fetch: the tokens, and what is reported of the rows of each part that has such rows.
        reported: those rows, with how many alternatives each wants, part by part.
    """

    token_ids: torch.Tensor  # [rows] int64, on the device
    fetch: Fetch
    reported: Sequence[Sequence[tuple[int, int]]]

    @property
    def is_ready(self) -> bool:
        """True if all of it is on the host."""
        return self.fetch.mark.is_reached

    def result(self) -> list[SampledToken]:
        """The tokens, one for each row; waits for them."""
        token_ids, *reports = self.fetch.wait()
        tokens = [SampledToken(token_id) for token_id in token_ids.tolist()]
        for reported, report in zip(self.reported, reports, strict=True):
            for (row, num_alternatives), values in zip(reported, report.tolist(), strict=True):
                logprobs = _logprobs(values, num_alternatives)
                tokens[row] = SampledToken(tokens[row].token_id, logprobs)
        return tokens


class DeviceSampler:
    """Implements `Sampler`."""

    def __init__(self, queue: DeviceQueue, vocab_size: int) -> None:
        self._queue = queue
        self._vocab_size = vocab_size

    def launch(
        self,
        logits: Iterable[torch.Tensor],  # each [part, vocab] float32; overwritten
        parts: Sequence[Sequence[SamplingRow]],
        source_ids: torch.Tensor | None,  # [rows of the launch before] int64
    ) -> DeviceTokens:
        """Draw one token per row. Log-probabilities are those before penalties and temperature.

        Args:
            logits: a few rows at once, computed one part after the other.
            source_ids: the tokens of the launch before; needed where a row has a `source_row`.
        """
        plans = [list(sampling_steps(rows, self._vocab_size, source_ids)) for rows in parts]
        arrays = [array for steps in plans for step in steps for array in step.arrays]
        placed = iter(self._queue.place(arrays) if arrays else ())
        token_ids, reports = [], []
        for part_logits, steps in zip(logits, plans, strict=True):
            part = Part.of(part_logits)
            for step in steps:
                step.run(part, *islice(placed, len(step.arrays)))
            token_ids.append(part.token_ids)
            if part.report.numel():
                reports.append(part.report)
        nothing = self._queue.place([np.empty(0, np.int64)]) if not parts else []
        sampled = torch.cat([*nothing, *token_ids])
        return DeviceTokens(sampled, self._queue.fetch([sampled, *reports]), _reported(parts))


def _reported(parts: Sequence[Sequence[SamplingRow]]) -> list[list[tuple[int, int]]]:
    """Rows of all parts that are reported, and how many alternatives of each, part by part."""
    reported, start = [], 0
    for rows in parts:
        wanted = [
            (start + index, row.params.logprobs)
            for index, row in enumerate(rows)
            if row.params.logprobs is not None
        ]
        if wanted:
            reported.append(wanted)
        start += len(rows)
    return reported


def _logprobs(values: Sequence[float], num_alternatives: int) -> TokenLogprobs:
    """A row of a report as it is told; others of its part may have more alternatives."""
    logprob, rank, *top = values
    most = len(top) // 2
    return TokenLogprobs(
        logprob=logprob,
        rank=int(rank),
        top_token_ids=tuple(map(int, top[:num_alternatives])),
        top_logprobs=tuple(top[most : most + num_alternatives]),
    )
