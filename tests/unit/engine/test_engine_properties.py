"""Whatever arrives, is cancelled, fails or is preempted: nothing leaks and everything finishes.

A random history of requests, batches in flight (several, as in a pipeline), cancels, failures,
pauses and pool sizes. The model reads its input back from the blocks it was given, so a block
shared, lost or freed too early shows as wrong output.
"""

from __future__ import annotations

from engine_helpers import BLOCK_SIZE, PagedModel, expected_output, make_request, make_scheduler
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from services.worker.engine.outputs import SchedulerOutput
from services.worker.engine.request import Request, RequestStatus
from services.worker.engine.scheduler import PauseState
from shared.messages import GenerateStatus

MAX_MODEL_LEN = 24
MIN_BLOCKS = MAX_MODEL_LEN // BLOCK_SIZE


class SchedulerMachine(RuleBasedStateMachine):
    """Random histories of one scheduler."""

    batches = Bundle("batches")

    @initialize(
        num_blocks=st.integers(MIN_BLOCKS, 14),
        budget=st.integers(4, 16),
        watermark=st.sampled_from([0.0, 0.1, 0.3]),
    )
    def start(self, num_blocks: int, budget: int, watermark: float) -> None:
        self.scheduler, self.blocks = make_scheduler(
            num_blocks=num_blocks,
            max_num_batched_tokens=budget,
            max_num_seqs=4,
            max_model_len=MAX_MODEL_LEN,
            max_num_waiting_requests=6,
            watermark=watermark,
            recovery_watermark=watermark,
        )
        self.model = PagedModel(BLOCK_SIZE)
        self.budget = budget
        self.in_flight: list[SchedulerOutput] = []
        self.now = 0.0
        self.accepted: list[Request] = []
        self.cancelled: set[str] = set()
        self.failed: set[str] = set()

    @rule(num_prompt_tokens=st.integers(1, 20), max_tokens=st.integers(1, 12))
    def arrive(self, num_prompt_tokens: int, max_tokens: int) -> None:
        self.now += 1.0
        name = f"r{len(self.accepted)}"
        request = make_request(name, num_prompt_tokens, self.now, max_tokens=max_tokens)
        result = self.scheduler.add(request)
        if result.status is GenerateStatus.ACCEPTED:
            self.accepted.append(request)
        else:
            assert result.status is GenerateStatus.OVERLOADED

    @rule(target=batches)
    def schedule(self) -> SchedulerOutput:
        running = [r for r in self.accepted if r.status is RequestStatus.RUNNING]
        output = self.scheduler.schedule(self.now)
        if running:
            assert running[0] not in output.preempted  # accepted in order of arrival
        assert output.num_scheduled_tokens <= self.budget
        waiting = [r for r in self.accepted if r.status is RequestStatus.WAITING]
        if waiting:
            newcomers = self.accepted[self.accepted.index(waiting[0]) :]
            assert all(r.first_scheduled_seconds is None for r in newcomers)
        if output.scheduled:
            self.in_flight.append(output)
        return output

    @rule(output=consumes(batches))
    def batch_returns(self, output: SchedulerOutput) -> None:
        if output.scheduled:
            self.in_flight.remove(output)
            self.scheduler.update_from_output(output, self.model.compute(output))

    @rule(output=consumes(batches))
    def batch_fails(self, output: SchedulerOutput) -> None:
        if output.scheduled:
            self.in_flight.remove(output)
            results = self.scheduler.fail_batch(output, "out of memory")
            self.failed.update(result.request.request_id for result in results)

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.accepted))
        was_here = request.key in self.scheduler.requests
        assert self.scheduler.cancel(request.request_id, request.attempt) == was_here
        if was_here:
            self.cancelled.add(request.request_id)

    @rule(state=st.sampled_from(PauseState))
    def pause(self, state: PauseState) -> None:
        self.scheduler.pause(state)

    @precondition(lambda self: self.scheduler.num_batches_in_flight == 0)
    @rule(num_blocks=st.integers(MIN_BLOCKS, 14))
    def resize(self, num_blocks: int) -> None:
        if num_blocks >= self.blocks.num_blocks:
            self.blocks.grow(num_blocks)
        else:
            moves = self.blocks.shrink(num_blocks, self.scheduler.requests.values())
            self.model.move(moves or [])

    @invariant()
    def nothing_is_lost(self) -> None:
        self.scheduler.check_integrity()
        for request in self.accepted:
            assert 0 <= request.num_computed_tokens <= request.num_tokens
            assert request.status.is_finished == (request.key not in self.scheduler.requests)
            if request.status.is_finished:
                assert request.block_table == []

    def teardown(self) -> None:
        """Let every batch return and run to the end: all that was accepted must finish."""
        self.scheduler.pause(PauseState.RUNNING)
        for output in list(self.in_flight):
            self.batch_returns(output)
        for _ in range(5000):
            if not self.scheduler.requests:
                break
            self.batch_returns(self.schedule())
            self.nothing_is_lost()
        assert not self.scheduler.requests
        assert self.blocks.num_used_blocks == 0
        for request in self.accepted:
            self._check_output(request)

    def _check_output(self, request: Request) -> None:
        expected = expected_output(request, MAX_MODEL_LEN)
        if request.request_id in self.failed:
            assert request.status is RequestStatus.FINISHED_ERROR
        elif request.request_id in self.cancelled:
            assert request.status is RequestStatus.FINISHED_ABORTED
        else:
            assert request.status is RequestStatus.FINISHED_LENGTH
            assert request.output_token_ids == expected
        assert request.output_token_ids == expected[: request.num_output_tokens]


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
