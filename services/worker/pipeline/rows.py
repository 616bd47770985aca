"""Batches as they travel: the leader's batch as a message, a message's rows as the sampler's."""

from __future__ import annotations

from services.worker.engine.outputs import SchedulerOutput
from services.worker.model.batch import SequenceSlice
from services.worker.model.sampler import SamplingRow
from services.worker.pipeline.messages import Microbatch, RowMessage
from shared.messages import pack_token_ids, unpack_token_ids


def microbatch(
    output: SchedulerOutput,
    slices: list[SequenceSlice],
    rows: list[SamplingRow],
    *,
    follows: bool,
) -> Microbatch:
    """The message that goes with the hidden states of a batch."""
    return Microbatch(
        step=output.step,
        follows=follows,
        keys=tuple(item.request.kv_key for item in output.scheduled),
        starts=tuple(item.start for item in slices),
        lengths=tuple(len(item.token_ids) for item in slices),
        wants_token=tuple(item.wants_token for item in slices),
        token_ids=pack_token_ids([token for item in slices for token in item.token_ids]),
        rows=tuple(_message(row) for row in rows),
    )


def sampling_row(message: RowMessage) -> SamplingRow:
    """What the sampler takes."""
    return SamplingRow(
        params=message.params,
        position=message.position,
        prompt_token_ids=unpack_token_ids(message.prompt_token_ids),
        output_token_ids=unpack_token_ids(message.output_token_ids),
        forbidden_token_ids=message.forbidden_token_ids,
    )


def _message(row: SamplingRow) -> RowMessage:
    params = row.params
    repeats = params.repetition_penalty != 1.0
    counts = bool(params.presence_penalty or params.frequency_penalty)
    return RowMessage(
        params=params,
        position=row.position,
        prompt_token_ids=pack_token_ids(row.prompt_token_ids) if repeats else b"",
        output_token_ids=pack_token_ids(row.output_token_ids) if repeats or counts else b"",
        forbidden_token_ids=tuple(row.forbidden_token_ids),
    )
