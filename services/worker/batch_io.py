"""What the model is given for a batch of the scheduler, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from services.worker.engine.outputs import ScheduledRequest, SchedulerOutput
from services.worker.engine.request import Request
from services.worker.engine.stopping import forbidden_token_ids
from services.worker.model.batch import UNKNOWN_TOKEN, SequenceSlice
from services.worker.model.sampler import SampledToken, SamplingRow


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """A batch that came back: one token for each of its sampled requests, or an error."""

    output: SchedulerOutput
    tokens: tuple[SampledToken, ...]
    error: str = ""


class BatchInput(NamedTuple):
    """A batch as the model takes it, in the order of its requests.

    Attributes:
        slices: the tokens to compute, with this worker's blocks.
        rows: one for each request that gets a token.
    """

    slices: list[SequenceSlice]
    rows: list[SamplingRow]


def batch_input(output: SchedulerOutput, before: SchedulerOutput | None = None) -> BatchInput:
    """What to compute.

    Args:
        before: the batch launched before, if it has not returned: its tokens are not known here,
            so the model is told which row of that launch a request goes on from.
    """
    sampled = before.sampled_requests if before is not None else []
    source_rows = {request: row for row, request in enumerate(sampled)}
    slices, rows = [], []
    for item in output.scheduled:
        request, end = item.request, item.num_computed_tokens + item.num_scheduled_tokens
        source_row = source_rows[request] if end > request.num_tokens else None
        slices.append(_slice(item, end, source_row))
        if item.wants_token:
            rows.append(_row(request, end, source_row))
    return BatchInput(slices, rows)


def _slice(item: ScheduledRequest, end: int, source_row: int | None) -> SequenceSlice:
    start = item.num_computed_tokens
    token_ids = item.request.token_ids(start, end)
    if source_row is not None:
        token_ids.append(UNKNOWN_TOKEN)
    return SequenceSlice(token_ids, start, item.request.block_table, item.wants_token, source_row)


def _row(request: Request, position: int, source_row: int | None) -> SamplingRow:
    return SamplingRow(
        params=request.sampling,
        position=position,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        forbidden_token_ids=forbidden_token_ids(request, position),
        source_row=source_row,
    )
