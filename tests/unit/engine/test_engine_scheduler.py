"""The scheduler's policy, case by case."""

from __future__ import annotations

import pytest
from engine_helpers import (
    BLOCK_SIZE,
    PagedModel,
    expected_output,
    make_request,
    make_scheduler,
    run_step,
    run_to_end,
)

from services.worker.engine.outputs import SchedulerOutput
from services.worker.engine.request import Request, RequestStatus
from services.worker.engine.scheduler import PauseState, Scheduler
from shared.errors import ConfigError
from shared.messages import FinishReason, GenerateStatus


def _taken(output: SchedulerOutput) -> list[tuple[str, int]]:
    return [(item.request.request_id, item.num_scheduled_tokens) for item in output.scheduled]


def _add(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        assert scheduler.add(request).status is GenerateStatus.ACCEPTED


class TestBatches:
    """What is in a batch."""

    def test_a_long_prompt_is_computed_in_chunks_and_then_decoded(self) -> None:
        scheduler, _ = make_scheduler(max_num_batched_tokens=8)
        model, request = PagedModel(BLOCK_SIZE), make_request("a", 20, max_tokens=2)
        _add(scheduler, request)
        chunks = []
        while scheduler.requests:
            output = scheduler.schedule(0.0)
            chunks.append((output.num_scheduled_tokens, len(output.sampled_requests)))
            scheduler.update_from_output(output, model.compute(output))
        assert chunks == [(8, 0), (8, 0), (4, 1), (1, 1)]

    def test_decodes_come_before_a_prefill_even_an_older_one(self) -> None:
        scheduler, _ = make_scheduler(max_num_batched_tokens=8)
        model = PagedModel(BLOCK_SIZE)
        young = make_request("young", 4, arrival_seconds=2.0)
        _add(scheduler, young)
        run_step(scheduler, model)
        _add(scheduler, make_request("old", 20, arrival_seconds=1.0))
        run_step(scheduler, model)
        assert _taken(scheduler.schedule(0.0)) == [("young", 1), ("old", 7)]

    def test_the_budget_is_shared_in_order_of_arrival(self) -> None:
        scheduler, _ = make_scheduler(max_num_batched_tokens=8)
        _add(scheduler, make_request("b", 6, 2.0), make_request("a", 5, 1.0))
        assert _taken(scheduler.schedule(0.0)) == [("a", 5), ("b", 3)]

    def test_seats_bound_the_running_requests(self) -> None:
        scheduler, _ = make_scheduler(max_num_seqs=2)
        _add(scheduler, *(make_request(name, 2, float(i)) for i, name in enumerate("abc")))
        assert _taken(scheduler.schedule(0.0)) == [("a", 2), ("b", 2)]

    def test_a_replay_goes_on_after_its_tokens(self) -> None:
        scheduler, _ = make_scheduler()
        model = PagedModel(BLOCK_SIZE)
        whole = expected_output(make_request("a", 6, max_tokens=6), 64)
        replay = make_request("a", 6, output_token_ids=tuple(whole[:4]), max_tokens=6)
        _add(scheduler, replay)
        (result,) = run_step(scheduler, model)
        assert (result.index, result.new_token_ids) == (4, (whole[4],))
        (result,) = run_step(scheduler, model)
        assert result.finish_reason is FinishReason.LENGTH
        assert replay.output_token_ids == whole

    def test_an_idle_engine_makes_an_empty_batch(self) -> None:
        scheduler, _ = make_scheduler()
        output = scheduler.schedule(0.0)
        assert (output.scheduled, scheduler.num_batches_in_flight) == ((), 0)

    def test_the_next_chunk_of_a_prompt_follows_through_the_stages(self) -> None:
        scheduler, _ = make_scheduler(num_stages=2, max_num_batched_tokens=8)
        request = make_request("a", 12)
        _add(scheduler, request, make_request("b", 4, 1.0))
        first = scheduler.schedule(0.0)
        second = scheduler.schedule(0.0)
        assert (_taken(first), _taken(second)) == ([("a", 8)], [("a", 4), ("b", 4)])
        assert not scheduler.schedule(0.0).scheduled
        assert (request.num_computed_tokens, scheduler.num_batches_in_flight) == (0, 2)
        model = PagedModel(BLOCK_SIZE)
        tokens = [model.compute(output) for output in (first, second)]
        assert scheduler.update_from_output(first, tokens[0]) == []
        assert request.num_computed_tokens == 8
        results = scheduler.update_from_output(second, tokens[1])
        assert [result.request.request_id for result in results] == ["a", "b"]

    def test_who_waits_for_a_token_is_in_no_second_batch(self) -> None:
        scheduler, _ = make_scheduler(num_stages=2, max_num_batched_tokens=8)
        _add(scheduler, make_request("a", 8), make_request("b", 4, 1.0))
        first = scheduler.schedule(0.0)
        second = scheduler.schedule(0.0)
        assert (_taken(first), _taken(second)) == ([("a", 8)], [("b", 4)])
        model = PagedModel(BLOCK_SIZE)
        scheduler.update_from_output(second, model.compute(second))
        assert _taken(scheduler.schedule(0.0)) == [("b", 1)]

    def test_a_chunk_that_fails_ends_the_prompt_when_the_next_one_returns(self) -> None:
        scheduler, blocks = make_scheduler(num_stages=2, max_num_batched_tokens=8)
        _add(scheduler, make_request("a", 12))
        first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
        (result,) = scheduler.fail_batch(first, "out of memory")
        assert result.finish_reason is FinishReason.ERROR
        assert blocks.num_used_blocks == 3  # the second batch still writes to them
        assert scheduler.update_from_output(second, [1]) == []
        assert (blocks.num_used_blocks, len(scheduler.requests)) == (0, 0)

    def test_queued_seconds_last_until_the_first_batch(self) -> None:
        scheduler, _ = make_scheduler()
        request = make_request("a", arrival_seconds=10.0)
        _add(scheduler, request)
        scheduler.schedule(12.5)
        assert request.queued_seconds == 2.5


class TestAdmission:
    """Who gets in."""

    def test_a_prompt_needs_blocks_for_all_its_tokens(self) -> None:
        scheduler, blocks = make_scheduler(num_blocks=8, max_num_batched_tokens=8)
        _add(scheduler, make_request("a", 24, 0.0), make_request("b", 12, 1.0))
        scheduler.schedule(0.0)
        assert blocks.num_used_blocks == 6
        assert scheduler.load().requests_waiting == 1

    def test_the_head_of_the_queue_is_not_overtaken(self) -> None:
        scheduler, _ = make_scheduler(num_blocks=8, max_num_batched_tokens=64)
        _add(
            scheduler,
            make_request("a", 20, 0.0),
            make_request("large", 20, 1.0),
            make_request("small", 4, 2.0),
        )
        assert _taken(scheduler.schedule(0.0)) == [("a", 20)]

    def test_the_watermark_stays_free_unless_nobody_runs(self) -> None:
        scheduler, blocks = make_scheduler(
            num_blocks=10, max_num_batched_tokens=64, watermark=0.2, recovery_watermark=0.2
        )
        _add(scheduler, make_request("a", 36, 0.0), make_request("b", 4, 1.0))
        assert _taken(scheduler.schedule(0.0)) == [("a", 36)]
        assert blocks.num_free_blocks == 1

    def test_a_request_as_long_as_the_pool_runs_to_its_end(self) -> None:
        scheduler, _ = make_scheduler(num_blocks=4, watermark=0.5, recovery_watermark=0.9)
        request = make_request("a", 10, max_tokens=100)
        _add(scheduler, request)
        run_to_end(scheduler, PagedModel(BLOCK_SIZE))
        assert request.status is RequestStatus.FINISHED_LENGTH
        assert request.num_tokens == 16

    def test_a_pool_too_small_for_one_request_is_refused_at_start(self) -> None:
        with pytest.raises(ConfigError, match="too few for one request"):
            make_scheduler(num_blocks=4, max_model_len=17)

    def test_seats_beyond_the_token_budget_are_refused_at_start(self) -> None:
        with pytest.raises(ConfigError, match="must not be less than"):
            make_scheduler(max_num_batched_tokens=4, max_num_seqs=5)


class TestRefusals:
    """What `add` says no to, and why."""

    def test_a_prompt_that_leaves_no_room_for_a_token(self) -> None:
        scheduler, _ = make_scheduler(max_model_len=8)
        result = scheduler.add(make_request("a", 8))
        assert result.status is GenerateStatus.TOO_LONG
        assert "8 tokens" in result.detail
        assert scheduler.add(make_request("b", 7)).status is GenerateStatus.ACCEPTED

    def test_an_empty_prompt(self) -> None:
        scheduler, _ = make_scheduler()
        assert scheduler.add(make_request("a", 0)).status is GenerateStatus.INVALID

    def test_a_replay_that_is_complete(self) -> None:
        scheduler, _ = make_scheduler()
        complete = make_request("a", 4, output_token_ids=(1, 2), max_tokens=2)
        assert scheduler.add(complete).status is GenerateStatus.INVALID

    def test_more_requests_than_may_wait(self) -> None:
        scheduler, _ = make_scheduler(max_num_waiting_requests=2)
        _add(scheduler, make_request("a"), make_request("b"))
        assert scheduler.add(make_request("c")).status is GenerateStatus.OVERLOADED
        scheduler.schedule(0.0)
        assert scheduler.add(make_request("c")).status is GenerateStatus.ACCEPTED

    def test_more_tokens_than_may_wait_but_an_empty_queue_takes_any(self) -> None:
        scheduler, _ = make_scheduler(max_num_waiting_tokens=10)
        _add(scheduler, make_request("a", 12))
        assert scheduler.add(make_request("b", 1)).status is GenerateStatus.OVERLOADED

    def test_everything_while_draining_and_the_rest_is_finished(self) -> None:
        scheduler, _ = make_scheduler(max_num_seqs=1)
        running, waiting = make_request("a"), make_request("b", arrival_seconds=1.0)
        _add(scheduler, running, waiting)
        scheduler.drain()
        assert scheduler.add(make_request("c")).status is GenerateStatus.DRAINING
        run_to_end(scheduler, PagedModel(BLOCK_SIZE))
        assert running.num_output_tokens == waiting.num_output_tokens == 8

    def test_a_repeated_request_is_accepted_once(self) -> None:
        scheduler, _ = make_scheduler()
        _add(scheduler, make_request("a"), make_request("a"))
        assert len(scheduler.requests) == 1


class TestPreemption:
    """Who gives way when the pool is full."""

    def _full(self, *lengths: int, **config: float) -> tuple[Scheduler, list[Request]]:
        """A pool of 8 blocks, full, where every request needs a new block for its next token."""
        scheduler, blocks = make_scheduler(num_blocks=8, max_num_batched_tokens=64, **config)
        requests = [
            make_request(f"r{i}", length, float(i), max_tokens=12)
            for i, length in enumerate(lengths)
        ]
        _add(scheduler, *requests)
        run_step(scheduler, PagedModel(BLOCK_SIZE))
        assert blocks.num_free_blocks == 0
        return scheduler, requests

    def test_the_younger_one_with_the_least_computed_gives_way(self) -> None:
        scheduler, (_, small, large) = self._full(12, 8, 12)
        output = scheduler.schedule(0.0)
        assert output.preempted == (small,)
        assert _taken(output) == [("r0", 1), ("r2", 1)]
        assert (small.status, small.num_computed_tokens) == (RequestStatus.PREEMPTED, 0)
        assert (large.num_preemptions, small.num_preemptions) == (0, 1)

    def test_of_equals_the_youngest_gives_way(self) -> None:
        scheduler, (_, _, young) = self._full(16, 8, 8)
        assert scheduler.schedule(0.0).preempted == (young,)

    def test_a_request_without_younger_ones_waits_with_its_blocks(self) -> None:
        scheduler, _ = make_scheduler(num_stages=2, num_blocks=8, max_num_batched_tokens=16)
        old, young = make_request("old", 16, 0.0), make_request("young", 16, 1.0)
        _add(scheduler, old, young)
        scheduler.schedule(0.0)
        scheduler.update_from_output(scheduler.schedule(0.0), [1])
        output = scheduler.schedule(0.0)
        assert (output.scheduled, output.preempted) == ((), ())
        assert (young.status, young.num_computed_tokens) == (RequestStatus.RUNNING, 16)

    def test_a_request_in_flight_is_not_preempted(self) -> None:
        scheduler, blocks = make_scheduler(num_stages=2, num_blocks=8, max_num_batched_tokens=16)
        old, young = make_request("old", 16, 0.0), make_request("young", 16, 1.0)
        _add(scheduler, old, young)
        first = scheduler.schedule(0.0)
        second = scheduler.schedule(0.0)
        assert (_taken(first), _taken(second)) == ([("old", 16)], [("young", 16)])
        model = PagedModel(BLOCK_SIZE)
        scheduler.update_from_output(first, model.compute(first))
        assert not scheduler.schedule(0.0).scheduled
        assert len(old.block_table) == 4  # it kept its blocks while it waited
        scheduler.update_from_output(second, model.compute(second))
        assert scheduler.schedule(0.0).preempted == (young,)
        blocks.check_integrity([old, young])

    def test_a_preempted_request_resumes_before_any_waiting_one(self) -> None:
        scheduler, (old, victim, large) = self._full(12, 8, 12)
        output = scheduler.schedule(0.0)
        assert output.preempted == (victim,)
        scheduler.update_from_output(output, [0] * len(output.sampled_requests))
        for request in (old, large):
            scheduler.cancel(request.request_id, 0)
        _add(scheduler, make_request("new", 4, 0.0))
        assert _taken(scheduler.schedule(0.0)) == [("r1", 9), ("new", 4)]

    @pytest.mark.parametrize(("watermark", "resumes"), [(0.1, True), (0.2, False)])
    def test_resuming_leaves_the_recovery_watermark_free(
        self, watermark: float, resumes: bool
    ) -> None:
        scheduler, (_, victim, large) = self._full(12, 8, 12, recovery_watermark=watermark)
        output = scheduler.schedule(0.0)
        scheduler.update_from_output(output, [0] * len(output.sampled_requests))
        scheduler.cancel(large.request_id, 0)  # 4 of 8 blocks are free, the victim needs 3
        scheduler.schedule(0.0)
        assert (victim.status is RequestStatus.RUNNING) == resumes

    def test_a_step_that_preempts_admits_nobody(self) -> None:
        scheduler, (_, _, small, large) = self._full(8, 8, 4, 12)
        output = scheduler.schedule(0.0)
        assert output.preempted == (small, large)
        # The large one left two blocks over, enough for the small one to come back at once.
        assert _taken(output) == [("r0", 1), ("r1", 1)]

    def test_output_is_the_same_as_without_preemption(self) -> None:
        scheduler, _ = make_scheduler(num_blocks=8, max_num_batched_tokens=9)
        requests = [make_request(f"r{i}", 5 + i, float(i), max_tokens=14) for i in range(6)]
        _add(scheduler, *requests)
        run_to_end(scheduler, PagedModel(BLOCK_SIZE))
        assert scheduler.load().num_preemptions > 0
        for request in requests:
            assert request.output_token_ids == expected_output(request, 32)


class TestCancel:
    """A client that goes away frees its KV within a step, wherever its request is."""

    def test_waiting(self) -> None:
        scheduler, _ = make_scheduler()
        _add(scheduler, make_request("a"))
        assert scheduler.cancel("a", 0)
        assert not scheduler.requests

    def test_running_between_batches(self) -> None:
        scheduler, blocks = make_scheduler()
        _add(scheduler, make_request("a"))
        run_step(scheduler, PagedModel(BLOCK_SIZE))
        assert scheduler.cancel("a", 0)
        assert (blocks.num_used_blocks, len(scheduler.requests)) == (0, 0)

    def test_in_flight_frees_when_the_batch_returns_and_not_earlier(self) -> None:
        scheduler, blocks = make_scheduler()
        request = make_request("a")
        _add(scheduler, request, make_request("b"))
        output = scheduler.schedule(0.0)
        assert scheduler.cancel("a", 0)
        assert scheduler.cancel("a", 0)  # idempotent
        assert blocks.num_used_blocks == 2
        assert not scheduler.schedule(0.0).scheduled
        (result,) = scheduler.update_from_output(output, [1, 2])
        assert (result.request.request_id, result.new_token_ids) == ("b", (2,))
        assert request.status is RequestStatus.FINISHED_ABORTED
        assert blocks.num_used_blocks == 1

    def test_in_flight_in_a_batch_that_fails(self) -> None:
        scheduler, blocks = make_scheduler()
        _add(scheduler, make_request("a"))
        output = scheduler.schedule(0.0)
        scheduler.cancel("a", 0)
        assert scheduler.fail_batch(output, "no memory") == []
        assert blocks.num_used_blocks == 0

    def test_preempted(self) -> None:
        scheduler, _ = make_scheduler(num_blocks=8, max_num_batched_tokens=64)
        _add(scheduler, make_request("a", 16, 0.0), make_request("b", 16, 1.0))
        run_step(scheduler, PagedModel(BLOCK_SIZE))
        (victim,) = scheduler.schedule(0.0).preempted
        assert scheduler.cancel(victim.request_id, 0)
        assert victim.status is RequestStatus.FINISHED_ABORTED

    def test_unknown_and_other_attempts_are_left_alone(self) -> None:
        scheduler, _ = make_scheduler()
        _add(scheduler, make_request("a"))
        assert not scheduler.cancel("a", 1)
        assert not scheduler.cancel("b", 0)
        assert len(scheduler.requests) == 1


class TestReturn:
    """What comes out of a batch."""

    def test_a_stop_token_ends_and_is_reported(self) -> None:
        scheduler, blocks = make_scheduler()
        _add(scheduler, make_request("a", eos_token_ids=(7,)))
        (result,) = scheduler.update_from_output(scheduler.schedule(0.0), [7])
        assert result.finish_reason is FinishReason.STOP
        assert (result.new_token_ids, result.stop_token_id) == ((7,), 7)
        assert (blocks.num_used_blocks, len(scheduler.requests)) == (0, 0)

    def test_a_failed_batch_fails_its_requests_and_no_others(self) -> None:
        scheduler, blocks = make_scheduler(max_num_batched_tokens=8)
        _add(scheduler, make_request("a", 8), make_request("b", 4, 1.0))
        output = scheduler.schedule(0.0)
        (result,) = scheduler.fail_batch(output, "out of memory")
        assert (result.finish_reason, result.error) == (FinishReason.ERROR, "out of memory")
        assert result.request.status is RequestStatus.FINISHED_ERROR
        assert blocks.num_used_blocks == 0
        assert _taken(scheduler.schedule(0.0)) == [("b", 4)]

    def test_a_batch_returns_once(self) -> None:
        scheduler, _ = make_scheduler()
        _add(scheduler, make_request("a"))
        output = scheduler.schedule(0.0)
        scheduler.update_from_output(output, [1])
        with pytest.raises(ValueError, match="not in flight"):
            scheduler.update_from_output(output, [1])

    def test_the_wrong_number_of_tokens_is_an_error_and_changes_nothing(self) -> None:
        scheduler, _ = make_scheduler()
        request = make_request("a")
        _add(scheduler, request)
        output = scheduler.schedule(0.0)
        with pytest.raises(ValueError, match="2 tokens for 1 requests"):
            scheduler.update_from_output(output, [1, 2])
        assert (request.num_computed_tokens, scheduler.num_batches_in_flight) == (0, 1)


class TestPause:
    """Transitions hold the engine without losing anything."""

    def test_no_new_keeps_running_ones_going(self) -> None:
        scheduler, _ = make_scheduler()
        model = PagedModel(BLOCK_SIZE)
        _add(scheduler, make_request("a"))
        run_step(scheduler, model)
        scheduler.pause(PauseState.NO_NEW)
        _add(scheduler, make_request("b", arrival_seconds=1.0))
        output = scheduler.schedule(0.0)
        assert _taken(output) == [("a", 1)]
        scheduler.update_from_output(output, model.compute(output))
        scheduler.pause(PauseState.RUNNING)
        assert _taken(scheduler.schedule(0.0)) == [("a", 1), ("b", 4)]

    def test_stopped_makes_no_batch_and_takes_returning_ones(self) -> None:
        scheduler, _ = make_scheduler()
        _add(scheduler, make_request("a"))
        output = scheduler.schedule(0.0)
        scheduler.pause(PauseState.STOPPED)
        assert not scheduler.schedule(0.0).scheduled
        assert len(scheduler.update_from_output(output, [1])) == 1
        assert scheduler.num_batches_in_flight == 0


def test_load_counts_what_runs_and_what_waits() -> None:
    scheduler, _ = make_scheduler(num_blocks=8, max_num_seqs=1)
    _add(scheduler, make_request("a", 5, 0.0), make_request("b", 9, 1.0), make_request("c", 4, 2.0))
    scheduler.schedule(0.0)
    load = scheduler.load()
    assert (load.kv_blocks_total, load.kv_blocks_used) == (8, 2)
    assert (load.requests_running, load.requests_waiting, load.waiting_blocks) == (1, 2, 4)
    assert (load.num_preemptions, load.engine_steps) == (0, 1)
