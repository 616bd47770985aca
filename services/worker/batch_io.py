"""What the model is given for a batch of the scheduler, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass

from services.worker.engine.outputs import ScheduledRequest, SchedulerOutput
from services.worker.engine.request import Request
from services.worker.engine.stopping import forbidden_token_ids
from services.worker.model.batch import SequenceSlice
from services.worker.model.sampler import SampledToken, SamplingRow


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """A batch that came back: one token for each of its sampled requests, or an error."""

    output: SchedulerOutput
    tokens: tuple[SampledToken, ...]
    error: str = ""


def sequence_slices(output: SchedulerOutput) -> list[SequenceSlice]:
    """The tokens to compute, in the batch's order, with this worker's blocks."""
    return [_slice(item) for item in output.scheduled]


def sampling_rows(output: SchedulerOutput) -> list[SamplingRow]:
    """A row for each request that gets a token, in the batch's order."""
    return [_row(request) for request in output.sampled_requests]


def _slice(item: ScheduledRequest) -> SequenceSlice:
    start = item.num_computed_tokens
    return SequenceSlice(
        token_ids=item.request.token_ids(start, start + item.num_scheduled_tokens),
        start=start,
        block_table=item.request.block_table,
        wants_token=item.wants_token,
    )


def _row(request: Request) -> SamplingRow:
    return SamplingRow(
        params=request.sampling,
        position=request.num_tokens,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        forbidden_token_ids=forbidden_token_ids(request),
    )
