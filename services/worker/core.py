"""One worker's engine: the scheduler decides, the model computes, the outcome becomes token items.

Runs in the engine thread (`engine_thread.py`) and knows no bus. A step makes one batch:

    schedule -> slices of tokens -> Model.launch ... later: tokens -> update_from_output -> items
             \\-> Pipeline.submit ...... later: finish(outcome) -----^

A launched batch is a flight until its tokens are taken in. A model that computes at once lands in
the same step. Else a step launches the next batch, where the scheduler makes one ahead, before it
waits for the one before, so that the device never waits for the host (`engine/overlap.py`):

    step 1: launch A    step 2: launch B, land A    step 3: launch C, land B    step 4: land C

After each step one flight at most is left. Flights land in the order of their launches, also where
a launch fails. A batch that fails (out of memory, a fault in a kernel) fails its requests and
nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import structlog

from services.worker.batch_io import BatchOutcome, batch_input
from services.worker.engine.outputs import SchedulerLoad, SchedulerOutput, StepResult
from services.worker.engine.request import Request
from services.worker.engine.routes import Route
from services.worker.engine.scheduler import Scheduler
from services.worker.model.batch import SequenceSlice
from services.worker.model.pending import PendingTokens
from services.worker.model.sampler import SamplingRow
from shared.messages import FinishReason, GenerateStatus, TokenItem, TokenLogprobs


class Model(Protocol):
    """What the engine needs of a model; `ModelRunner` is one."""

    def launch(
        self,
        slices: Sequence[SequenceSlice],
        rows: Sequence[SamplingRow],
        source: PendingTokens | None,
    ) -> PendingTokens:
        """Have a batch computed; one token for each slice that wants one, in their order.

        Args:
            source: the launch before, where slices or rows go on from a row of it.
        """
        ...


class Pipeline(Protocol):
    """What the engine needs of a route with several stages; `PipelineLeader` is one."""

    def submit(self, output: SchedulerOutput) -> None:
        """Send a batch on its way; what comes of it goes to `EngineCore.finish`."""
        ...


class _Flight(NamedTuple):
    """A launched batch whose tokens have not been taken in."""

    output: SchedulerOutput
    tokens: PendingTokens


class EngineCore:
    """Scheduler and model of one worker. Not thread-safe."""

    def __init__(self, scheduler: Scheduler, model: Model) -> None:
        self._scheduler = scheduler
        self._model = model
        self._pipelines: dict[str, Pipeline] = {}
        self._flights: deque[_Flight] = deque()  # oldest first
        self._is_waiting = True
        self._log = structlog.get_logger(component="engine")

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.requests)

    @property
    def is_waiting(self) -> bool:
        """True if the last step found nothing to do: all is in pipelines, or there is nothing."""
        return self._is_waiting

    @property
    def is_computing(self) -> bool:
        """True while a launched batch has not landed: it may still write KV here."""
        return bool(self._flights)

    def load(self) -> SchedulerLoad:
        return self._scheduler.load()

    def add_pipeline(self, route: Route, pipeline: Pipeline) -> None:
        """Batches of `route` go into `pipeline` from now on."""
        self._pipelines[route.route_id] = pipeline

    def remove_pipeline(self, route: Route) -> None:
        """No batch will be made for `route` any more."""
        self._pipelines.pop(route.route_id, None)

    def add(self, request: Request) -> list[TokenItem]:
        """Queue a request; a refusal ends its stream with an error item."""
        result = self._scheduler.add(request)
        if result.status is GenerateStatus.ACCEPTED:
            return []
        return [_closing_item(request, FinishReason.ERROR, result.detail)]

    def cancel(self, request_id: str, attempt: int) -> None:
        """Free everything the request holds, at once or when its batch returns."""
        self._scheduler.cancel(request_id, attempt)

    def lose_all(self) -> list[TokenItem]:
        """Forget all requests and batches; their routers replay them."""
        for flight in self._flights:  # their blocks are about to belong to others
            with suppress(Exception):
                flight.tokens.result()
        self._flights.clear()
        return [_lost_item(request) for request in self._scheduler.lose_all()]

    def lose_worker(self, worker_id: str) -> list[TokenItem]:
        """Forget what needs a worker that is gone; routers replay requests whose KV is there."""
        return [_lost_item(request) for request in self._scheduler.lose_worker(worker_id)]

    def drain(self) -> None:
        """Take no new requests."""
        self._scheduler.drain()

    def check_integrity(self) -> None:
        """Raise unless every KV block is free or has exactly one owner."""
        self._scheduler.check_integrity()

    def step(self, now: float) -> list[TokenItem]:
        """Launch a batch or send one into its pipeline, if there is one, and land those before it.

        Where there is none, wait for the one that is launched.
        """
        output = self._scheduler.schedule(now)
        num_left = 1 if output.scheduled else 0
        self._is_waiting = not output.scheduled and not self._flights
        items = self._start(output) if output.scheduled else []
        while len(self._flights) > num_left or (self._flights and self._flights[0].tokens.is_ready):
            items += self._land()
        return items

    def finish(self, outcome: BatchOutcome) -> list[TokenItem]:
        """Take in what came of a batch."""
        items = self._fail(outcome) if outcome.error else self._update(outcome)
        if not self.has_work:
            self._scheduler.check_integrity()
        return items

    def _start(self, output: SchedulerOutput) -> list[TokenItem]:
        pipeline = self._pipelines.get(output.route.route_id)
        try:
            if pipeline is not None:
                pipeline.submit(output)
            else:
                self._launch(output)
        except Exception as error:  # whatever it is, it must not take the other requests along
            failed = self._failed(output, error)
            return [*self._land_all(), *self.finish(failed)]  # batches return in order
        return []

    def _launch(self, output: SchedulerOutput) -> None:
        if self._flights:
            before, source = self._flights[-1]
            tokens = self._model.launch(*batch_input(output, before), source)
        else:
            tokens = self._model.launch(*batch_input(output), None)
        self._flights.append(_Flight(output, tokens))

    def _land_all(self) -> list[TokenItem]:
        return [item for _ in range(len(self._flights)) for item in self._land()]

    def _land(self) -> list[TokenItem]:
        """Take in the oldest flight; waits for it."""
        output, pending = self._flights.popleft()
        try:
            tokens = pending.result()
        except Exception as error:  # as above
            return self.finish(self._failed(output, error))
        return self.finish(BatchOutcome(output, tuple(tokens)))

    def _failed(self, output: SchedulerOutput, error: Exception) -> BatchOutcome:
        self._log.exception("batch failed", requests=len(output.scheduled))
        return BatchOutcome(output, (), error=f"the worker failed a batch: {error}")

    def _fail(self, outcome: BatchOutcome) -> list[TokenItem]:
        failed = self._scheduler.fail_batch(outcome.output, outcome.error)
        return [_item(result, None) for result in failed]

    def _update(self, outcome: BatchOutcome) -> list[TokenItem]:
        requests, tokens = outcome.output.sampled_requests, outcome.tokens
        logprobs = {
            request.key: token.logprobs for request, token in zip(requests, tokens, strict=True)
        }
        results = self._scheduler.update_from_output(
            outcome.output, [token.token_id for token in tokens]
        )
        return [_item(result, logprobs[result.request.key]) for result in results]


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


def _lost_item(request: Request) -> TokenItem:
    return TokenItem(
        request_id=request.request_id,
        attempt=request.attempt,
        index=0,
        finish_reason=FinishReason.LOST,
    )


def _closing_item(request: Request, reason: FinishReason, error: str) -> TokenItem:
    return TokenItem(
        request_id=request.request_id,
        attempt=request.attempt,
        index=request.num_output_tokens,
        finish_reason=reason,
        error=error,
    )
