"""Whatever arrives, is cancelled, fails or is preempted: nothing leaks and everything finishes.

A random history of requests, batches in flight (two where they overlap), cancels, failures, pauses
and pool sizes. The model reads its input back from the blocks it was given, so a block shared, lost
or freed too early shows as wrong output. With and without overlap the tokens are the same: those of
an undisturbed run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine_helpers import BLOCK_SIZE, PagedModel, expected_output, make_request, make_scheduler
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from services.worker.engine.outputs import SchedulerOutput
from services.worker.engine.request import Request, RequestStatus
from services.worker.engine.scheduler import PauseState
from services.worker.engine.stopping import is_stop_token
from shared.messages import FinishReason, GenerateStatus

MAX_MODEL_LEN = 24
MIN_BLOCKS = MAX_MODEL_LEN // BLOCK_SIZE


@dataclass
class Flight:
    """A batch whose tokens are computed, but not told yet, and the blocks it wrote."""

    output: SchedulerOutput
    sampled: list[int]
    blocks: list[tuple[Request, list[int]]] = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = [(i.request, list(i.request.block_table)) for i in self.output.scheduled]


class SchedulerMachine(RuleBasedStateMachine):
    """Random histories of one scheduler."""

    @initialize(
        num_blocks=st.integers(MIN_BLOCKS, 14),
        budget=st.integers(4, 16),
        watermark=st.sampled_from([0.0, 0.1, 0.3]),
        overlaps=st.booleans(),
    )
    def start(self, num_blocks: int, budget: int, watermark: float, overlaps: bool) -> None:
        self.scheduler, self.blocks = make_scheduler(
            num_blocks=num_blocks,
            max_num_batched_tokens=budget,
            max_num_seqs=4,
            max_model_len=MAX_MODEL_LEN,
            max_num_waiting_requests=6,
            watermark=watermark,
            recovery_watermark=watermark,
            overlaps=overlaps,
        )
        self.model = PagedModel(BLOCK_SIZE)
        self.budget = budget
        self.capacity = 2 if overlaps else 1
        self.in_flight: list[Flight] = []  # oldest first
        self.now = 0.0
        self.accepted: list[Request] = []
        self.cancelled: set[str] = set()
        self.failed: set[str] = set()
        self.finished: dict[str, FinishReason] = {}

    @rule(
        num_prompt_tokens=st.integers(1, 20),
        max_tokens=st.integers(1, 12),
        min_tokens=st.integers(0, 3),
        stop_tokens=st.sets(st.integers(0, 96), max_size=30),
    )
    def arrive(
        self, num_prompt_tokens: int, max_tokens: int, min_tokens: int, stop_tokens: set[int]
    ) -> None:
        self.now += 1.0
        request = make_request(
            f"r{len(self.accepted)}",
            num_prompt_tokens,
            self.now,
            eos_token_ids=tuple(stop_tokens),
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens),
        )
        result = self.scheduler.add(request)
        if result.status is GenerateStatus.ACCEPTED:
            self.accepted.append(request)
        else:
            assert result.status is GenerateStatus.OVERLOADED

    @rule()
    def schedule(self) -> None:
        running = [r for r in self.accepted if r.status is RequestStatus.RUNNING]
        output = self.scheduler.schedule(self.now)
        if running:
            assert running[0] not in output.preempted  # accepted in order of arrival
        assert output.num_scheduled_tokens <= self.budget
        waiting = [r for r in self.accepted if r.status is RequestStatus.WAITING]
        if waiting:
            newcomers = self.accepted[self.accepted.index(waiting[0]) :]
            assert all(r.first_scheduled_seconds is None for r in newcomers)
        if self.in_flight:
            assert output.preempted == ()
        if output.scheduled:
            self.in_flight.append(Flight(output, self.model.compute(output)))
        assert len(self.in_flight) <= self.capacity

    @precondition(lambda self: self.in_flight)
    @rule()
    def batch_returns(self) -> None:
        flight = self.in_flight.pop(0)
        for result in self.scheduler.update_from_output(flight.output, flight.sampled):
            assert result.request.request_id not in self.finished
            if result.finish_reason is not None:
                self.finished[result.request.request_id] = result.finish_reason

    @precondition(lambda self: self.in_flight)
    @rule()
    def batch_fails(self) -> None:
        results = self.scheduler.fail_batch(self.in_flight.pop(0).output, "out of memory")
        failed = {result.request.request_id for result in results}
        assert not failed & (self.failed | self.finished.keys())
        self.failed |= failed

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.accepted))
        was_here = request.key in self.scheduler.requests
        assert self.scheduler.cancel(request.request_id, request.attempt) == was_here
        has_ended = request.request_id in self.failed or request.request_id in self.finished
        if was_here and not has_ended:
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

    @invariant()
    def batches_in_flight_keep_their_blocks(self) -> None:
        for request, blocks in [each for flight in self.in_flight for each in flight.blocks]:
            assert request.block_table[: len(blocks)] == blocks
        for request in self.accepted:
            items = [
                item
                for flight in self.in_flight
                for item in flight.output.scheduled
                if item.request is request
            ]
            assert request.num_scheduled_tokens == sum(i.num_scheduled_tokens for i in items)
            assert request.num_pending_tokens == sum(i.wants_token for i in items)

    def teardown(self) -> None:
        """Let every batch return and run to the end: all that was accepted must finish."""
        self.scheduler.pause(PauseState.RUNNING)
        for _ in range(5000):
            if not self.scheduler.requests:
                break
            num_before = len(self.in_flight)
            self.schedule()
            if len(self.in_flight) in (num_before, self.capacity):  # as the engine does it
                self.batch_returns()
            self.nothing_is_lost()
            self.batches_in_flight_keep_their_blocks()
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
            self._check_end(request)
            assert request.output_token_ids == expected
        assert request.output_token_ids == expected[: request.num_output_tokens]

    def _check_end(self, request: Request) -> None:
        """It was told once, and it is the right one."""
        if is_stop_token(request, request.output_token_ids[-1]):
            assert request.status is RequestStatus.FINISHED_STOPPED
            assert self.finished[request.request_id] is FinishReason.STOP
        else:
            assert request.status is RequestStatus.FINISHED_LENGTH
            assert self.finished[request.request_id] is FinishReason.LENGTH


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=300,
    stateful_step_count=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
