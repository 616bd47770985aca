"""A batch made while the one before it is computed: who is in it, and what becomes of the ends."""

from __future__ import annotations

from collections import deque

import pytest
from engine_helpers import (
    BLOCK_SIZE,
    PagedModel,
    expected_output,
    make_request,
    make_route,
    make_scheduler,
    run_step,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.block_manager import BlockIntegrityError
from services.worker.engine.outputs import SchedulerOutput
from services.worker.engine.relocation import RelocationError
from services.worker.engine.request import Request, RequestStatus
from services.worker.engine.scheduler import PauseState, Scheduler
from services.worker.engine.shrinking import ShrinkError
from shared.messages import FinishReason, GenerateStatus

TOKEN, OTHER, STOP = 5, 6, 90


def _taken(output: SchedulerOutput) -> list[tuple[str, int, int]]:
    """Of each request where its tokens begin and how many they are."""
    return [
        (item.request.request_id, item.num_computed_tokens, item.num_scheduled_tokens)
        for item in output.scheduled
    ]


def _add(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        assert scheduler.add(request).status is GenerateStatus.ACCEPTED


def _two_in_flight(
    **sampling: object,
) -> tuple[Scheduler, Request, SchedulerOutput, SchedulerOutput]:
    """A request that is in two batches, both of which sample a token."""
    scheduler, _ = make_scheduler(overlaps=True)
    request = make_request("a", 4, **sampling)
    _add(scheduler, request)
    return scheduler, request, scheduler.schedule(0.0), scheduler.schedule(0.0)


class TestAhead:
    """What the second batch contains."""

    def test_a_request_goes_on_from_a_token_that_nobody_knows_yet(self) -> None:
        scheduler, request, first, second = _two_in_flight()
        assert (_taken(first), _taken(second)) == ([("a", 0, 4)], [("a", 4, 1)])
        assert second.sampled_requests == [request]
        assert (request.output_token_ids, request.num_pending_tokens) == ([], 2)
        assert not scheduler.schedule(0.0).scheduled  # two are enough
        for output, token in ((first, TOKEN), (second, OTHER)):
            (result,) = scheduler.update_from_output(output, [token])
            assert result.new_token_ids == (token,)
        assert request.output_token_ids == [TOKEN, OTHER]
        assert (request.num_computed_tokens, request.num_pending_tokens) == (5, 0)

    def test_a_prompt_goes_on_with_its_next_chunk(self) -> None:
        scheduler, _ = make_scheduler(overlaps=True, max_num_batched_tokens=8)
        _add(scheduler, make_request("a", 20))
        first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
        scheduler.update_from_output(first, [])
        third = scheduler.schedule(0.0)
        chunks = [("a", 0, 8)], [("a", 8, 8)], [("a", 16, 4)]
        assert (_taken(first), _taken(second), _taken(third)) == chunks
        assert [len(output.sampled_requests) for output in (first, second, third)] == [0, 0, 1]

    def test_new_requests_join(self) -> None:
        scheduler, _ = make_scheduler(overlaps=True)
        _add(scheduler, make_request("a", 4))
        scheduler.schedule(0.0)
        _add(scheduler, make_request("b", 4, 1.0))
        assert _taken(scheduler.schedule(0.0)) == [("a", 4, 1), ("b", 0, 4)]

    @pytest.mark.parametrize("limit", [{"max_tokens": 2}, {"max_tokens": 9}])
    def test_who_reaches_its_length_is_left_out(self, limit: dict[str, int]) -> None:
        scheduler, _ = make_scheduler(num_blocks=4, max_model_len=6, overlaps=True)
        request = make_request("a", 4, **limit)
        _add(scheduler, request)
        first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
        assert not scheduler.schedule(0.0).scheduled
        scheduler.update_from_output(first, [TOKEN])
        assert not scheduler.schedule(0.0).scheduled
        (result,) = scheduler.update_from_output(second, [OTHER])
        assert result.finish_reason is FinishReason.LENGTH
        assert request.output_token_ids == [TOKEN, OTHER]

    def test_the_block_for_the_unknown_token_is_there(self) -> None:
        _, request, _, _ = _two_in_flight()
        assert len(request.block_table) == 2  # 4 tokens of the prompt, and one

    def test_nothing_is_made_ahead_where_somebody_would_have_to_give_way(self) -> None:
        """Also none for those who have their blocks: the oldest must not wait for them."""
        scheduler, blocks = make_scheduler(num_blocks=4, overlaps=True)
        old, young = make_request("old", 8, 0.0), make_request("young", 6, 1.0)
        _add(scheduler, old, young)
        first = scheduler.schedule(0.0)
        assert blocks.num_free_blocks == 0
        assert not scheduler.schedule(0.0).scheduled
        scheduler.update_from_output(first, [TOKEN, OTHER])
        alone = scheduler.schedule(0.0)
        assert (alone.preempted, _taken(alone)) == ((young,), [("old", 8, 1)])

    def test_nothing_is_made_ahead_while_stopped(self) -> None:
        scheduler, _ = make_scheduler(overlaps=True)
        _add(scheduler, make_request("a", 4))
        first = scheduler.schedule(0.0)
        scheduler.pause(PauseState.STOPPED)
        assert not scheduler.schedule(0.0).scheduled
        scheduler.update_from_output(first, [TOKEN])
        assert scheduler.num_batches_in_flight == 0

    @pytest.mark.parametrize(("num_stages", "overlaps"), [(1, False), (2, True)])
    def test_only_on_one_stage_and_only_where_it_is_asked_for(
        self, num_stages: int, overlaps: bool
    ) -> None:
        scheduler, _ = make_scheduler(num_stages=num_stages, overlaps=overlaps)
        _add(scheduler, make_request("a", 4))
        assert scheduler.schedule(0.0).scheduled
        assert not scheduler.schedule(0.0).scheduled


class TestEnds:
    """A request that ends while a later batch contains it."""

    def test_a_stop_token_is_told_at_once_and_the_token_behind_it_dropped(self) -> None:
        scheduler, request, first, second = _two_in_flight(stop_token_ids=(STOP,))
        (result,) = scheduler.update_from_output(first, [STOP])
        assert (result.finish_reason, result.stop_token_id) == (FinishReason.STOP, STOP)
        assert (request.status, len(request.block_table)) == (RequestStatus.ENDING, 2)
        assert not scheduler.schedule(0.0).scheduled
        scheduler.check_integrity()
        assert scheduler.update_from_output(second, [TOKEN]) == []
        assert (request.status, request.block_table) == (RequestStatus.FINISHED_STOPPED, [])
        assert request.output_token_ids == [STOP]
        assert not scheduler.requests

    def test_a_cancelled_one_frees_its_blocks_with_its_last_batch(self) -> None:
        scheduler, request, first, second = _two_in_flight()
        assert scheduler.cancel("a", 0)
        assert scheduler.cancel("a", 0)  # idempotent
        assert scheduler.update_from_output(first, [TOKEN]) == []
        assert (request.status, len(request.block_table)) == (RequestStatus.ENDING, 2)
        assert scheduler.update_from_output(second, [TOKEN]) == []
        assert (request.status, request.block_table) == (RequestStatus.FINISHED_ABORTED, [])

    def test_cancelling_one_that_has_stopped_changes_nothing(self) -> None:
        scheduler, request, first, second = _two_in_flight(stop_token_ids=(STOP,))
        scheduler.update_from_output(first, [STOP])
        assert scheduler.cancel("a", 0)
        assert scheduler.update_from_output(second, [TOKEN]) == []
        assert request.status is RequestStatus.FINISHED_STOPPED

    @pytest.mark.parametrize("second_fails", [True, False])
    def test_a_failure_is_told_once_and_hits_nobody_else(self, second_fails: bool) -> None:
        scheduler, blocks = make_scheduler(overlaps=True)
        both, other = make_request("both", 4), make_request("other", 4, 1.0)
        _add(scheduler, both)
        first = scheduler.schedule(0.0)
        _add(scheduler, other)
        second = scheduler.schedule(0.0)
        (failed,) = scheduler.fail_batch(first, "out of memory")
        assert (failed.request, failed.finish_reason) == (both, FinishReason.ERROR)
        assert (both.status, len(both.block_table)) == (RequestStatus.ENDING, 2)
        if second_fails:
            (result,) = scheduler.fail_batch(second, "out of memory")
            assert (result.request, result.error) == (other, "out of memory")
        else:
            (result,) = scheduler.update_from_output(second, [TOKEN, OTHER])
            assert (result.request, result.new_token_ids) == (other, (OTHER,))
        assert both.status is RequestStatus.FINISHED_ERROR
        assert blocks.num_used_blocks == len(other.block_table)

    def test_a_failure_of_the_second_leaves_the_token_of_the_first(self) -> None:
        scheduler, request, first, second = _two_in_flight()
        scheduler.update_from_output(first, [TOKEN])
        (result,) = scheduler.fail_batch(second, "out of memory")
        assert (result.index, result.finish_reason) == (1, FinishReason.ERROR)
        assert (request.output_token_ids, request.block_table) == ([TOKEN], [])

    def test_batches_return_in_order(self) -> None:
        scheduler, request, first, second = _two_in_flight()
        with pytest.raises(ValueError, match="before an older one"):
            scheduler.update_from_output(second, [TOKEN])
        assert (request.num_scheduled_tokens, request.num_pending_tokens) == (5, 2)
        scheduler.update_from_output(first, [TOKEN])
        scheduler.update_from_output(second, [TOKEN])

    def test_a_loss_takes_both_batches_along(self) -> None:
        scheduler, request, first, _ = _two_in_flight()
        assert scheduler.lose_all() == [request]
        assert (request.num_scheduled_tokens, request.num_pending_tokens) == (0, 0)
        assert (request.status, request.block_table) == (RequestStatus.FINISHED_ERROR, [])
        with pytest.raises(ValueError, match="not in flight"):
            scheduler.update_from_output(first, [TOKEN])
        _add(scheduler, make_request("b", 4))
        assert run_step(scheduler, PagedModel(BLOCK_SIZE))

    def test_a_loss_mentions_nobody_whose_end_is_told(self) -> None:
        scheduler, request, first, _ = _two_in_flight(stop_token_ids=(STOP,))
        scheduler.update_from_output(first, [STOP])
        assert scheduler.lose_all() == []
        assert request.status is RequestStatus.FINISHED_STOPPED


class TestBoundary:
    """Whoever moves requests or blocks must wait until nothing is in flight."""

    @pytest.mark.parametrize("num_returned", [0, 1])
    def test_requests_stay_while_a_batch_has_them(self, num_returned: int) -> None:
        scheduler, request, *outputs = _two_in_flight()
        for output in outputs[:num_returned]:
            scheduler.update_from_output(output, [TOKEN])
        relocation, target = scheduler.relocation, make_route(2)
        plan = scheduler.plan_shrink({"w0": 16})
        assert not relocation.move(request, target)
        relocation.enter(target)
        for moving in (
            relocation.park_running,
            relocation.hand_over_all,
            lambda: relocation.hand_over(request),
            lambda: relocation.recompute_outside(()),
        ):
            with pytest.raises(RelocationError, match="in flight"):
                moving()
        with pytest.raises(ShrinkError, match="in flight"):
            scheduler.shrink(plan)
        assert request.status is RequestStatus.RUNNING

    def test_they_move_when_all_have_returned(self) -> None:
        scheduler, request, *outputs = _two_in_flight()
        for output in outputs:
            scheduler.update_from_output(output, [TOKEN])
        scheduler.shrink(scheduler.plan_shrink({"w0": 16}))
        assert scheduler.relocation.move(request, make_route(2))
        assert scheduler.relocation.hand_over_all() == [request]

    def test_the_pool_itself_refuses(self) -> None:
        scheduler, request, *_ = _two_in_flight()
        pool, route = scheduler._pool, make_route(1)
        for moving in (
            lambda: pool.preempt(request),
            lambda: pool.park(request, route, route),
            lambda: pool.hand_over(request),
        ):
            with pytest.raises(BlockIntegrityError, match="in flight"):
                moving()
        assert len(request.block_table) == 2


requests_ = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=12)


@given(requests=requests_, num_blocks=st.integers(6, 12), budget=st.integers(4, 12))
@settings(max_examples=200)
def test_the_oldest_running_request_goes_on_with_every_second_batch(
    requests: list[tuple[int, int]], num_blocks: int, budget: int
) -> None:
    """However scarce blocks are, and however many younger ones come: nobody starves."""
    scheduler, _ = make_scheduler(
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=4,
        max_model_len=24,
        overlaps=True,
    )
    model, in_flight = PagedModel(BLOCK_SIZE), deque[tuple[SchedulerOutput, list[int]]]()
    coming = deque(
        make_request(f"r{i}", length, float(i), max_tokens=max_tokens)
        for i, (length, max_tokens) in enumerate(requests)
    )
    everybody, num_idle, progress = list(coming), 0, (None, 0)
    while coming or scheduler.requests:
        if coming:
            _add(scheduler, coming.popleft())
        output = scheduler.schedule(0.0)
        if output.scheduled:
            in_flight.append((output, model.compute(output)))
        if output.scheduled and len(in_flight) < 2:
            continue
        scheduler.update_from_output(*in_flight.popleft())
        running = [r for r in everybody if r.status is RequestStatus.RUNNING]
        before = progress
        progress = (running[0], running[0].num_computed_tokens) if running else (None, 0)
        num_idle = num_idle + 1 if running and progress == before else 0
        assert num_idle < 2
    for request in everybody:
        assert request.output_token_ids == expected_output(request, 24)
