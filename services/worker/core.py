"""One worker's engine: the scheduler decides, the model computes, the outcome becomes token items.

Runs in the engine thread (`engine_thread.py`) and knows no bus. One `step` is one batch:

    schedule -> slices of tokens -> Model.run -> sampled tokens -> update_from_output -> TokenItems

A batch that fails (out of memory, a fault in a kernel) fails its requests and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import structlog

from services.worker.engine.outputs import SchedulerLoad, SchedulerOutput, StepResult
from services.worker.engine.request import Request
from services.worker.engine.scheduler import Scheduler
from services.worker.engine.stopping import forbidden_token_ids
from services.worker.model.batch import SequenceSlice
from services.worker.model.sampler import SampledToken, SamplingRow
from shared.messages import FinishReason, GenerateStatus, TokenItem, TokenLogprobs


class Model(Protocol):
    """What the engine needs of a model; `ModelRunner` is one."""

    def run(
        self, slices: Sequence[SequenceSlice], rows: Sequence[SamplingRow]
    ) -> list[SampledToken]:
        """Compute a batch; one token for each slice that wants one, in their order."""
        ...


class EngineCore:
    """Scheduler and model of one worker. Not thread-safe."""

    def __init__(self, scheduler: Scheduler, model: Model) -> None:
        self._scheduler = scheduler
        self._model = model
        self._log = structlog.get_logger(component="engine")

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.requests)

    def load(self) -> SchedulerLoad:
        return self._scheduler.load()

    def add(self, request: Request) -> list[TokenItem]:
        """Queue a request; a refusal ends its stream with an error item."""
        result = self._scheduler.add(request)
        if result.status is GenerateStatus.ACCEPTED:
            return []
        return [_closing_item(request, FinishReason.ERROR, result.detail)]

    def cancel(self, request_id: str, attempt: int) -> None:
        """Free everything the request holds, at once or when its batch returns."""
        self._scheduler.cancel(request_id, attempt)

    def drain(self) -> None:
        """Take no new requests."""
        self._scheduler.drain()

    def check_integrity(self) -> None:
        """Raise unless every KV block is free or has exactly one owner."""
        self._scheduler.check_integrity()

    def step(self, now: float) -> list[TokenItem]:
        """Compute one batch, if there is one to compute."""
        output = self._scheduler.schedule(now)
        if not output.scheduled:
            return []
        items = self._compute(output)
        if not self.has_work:
            self._scheduler.check_integrity()
        return items

    def _compute(self, output: SchedulerOutput) -> list[TokenItem]:
        sampled_requests = output.sampled_requests
        try:
            tokens = self._model.run(
                _slices(output), [_sampling_row(request) for request in sampled_requests]
            )
        except Exception as error:  # whatever it is, it must not take the other requests along
            self._log.exception("batch failed", requests=len(output.scheduled))
            failed = self._scheduler.fail_batch(output, f"the worker failed a batch: {error}")
            return [_item(result, None) for result in failed]
        logprobs = {
            request.key: token.logprobs
            for request, token in zip(sampled_requests, tokens, strict=True)
        }
        results = self._scheduler.update_from_output(output, [token.token_id for token in tokens])
        return [_item(result, logprobs[result.request.key]) for result in results]


def _slices(output: SchedulerOutput) -> list[SequenceSlice]:
    return [
        SequenceSlice(
            token_ids=item.request.token_ids(
                item.num_computed_tokens, item.num_computed_tokens + item.num_scheduled_tokens
            ),
            start=item.num_computed_tokens,
            block_table=item.request.block_table,
            wants_token=item.wants_token,
        )
        for item in output.scheduled
    ]


def _sampling_row(request: Request) -> SamplingRow:
    return SamplingRow(
        params=request.sampling,
        position=request.num_tokens,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        forbidden_token_ids=forbidden_token_ids(request),
    )


def _item(result: StepResult, logprobs: TokenLogprobs | None) -> TokenItem:
    request = result.request
    return TokenItem(
        request_id=request.request_id,
        attempt=request.attempt,
        index=result.index,
        token_ids=result.new_token_ids,
        logprobs=None if logprobs is None else (logprobs,),
        finish_reason=result.finish_reason,
        stop_token_id=result.stop_token_id,
        error=result.error,
        queued_seconds=request.queued_seconds if result.index == 0 else None,
    )


def _closing_item(request: Request, reason: FinishReason, error: str) -> TokenItem:
    return TokenItem(
        request_id=request.request_id,
        attempt=request.attempt,
        index=request.num_output_tokens,
        finish_reason=reason,
        error=error,
    )
