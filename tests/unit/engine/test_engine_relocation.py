"""Routes, exchanges, shrinking and loss, case by case."""

from __future__ import annotations

import pytest
from engine_helpers import BLOCK_SIZE, PagedModel, make_request, make_scheduler, run_step

from services.worker.engine.exchange import Exchange, exchange_order
from services.worker.engine.outputs import SchedulerOutput
from services.worker.engine.relocation import RelocationError
from services.worker.engine.request import Request, RequestStatus
from services.worker.engine.routes import Route, RouteStage, Transfer, transfers
from services.worker.engine.scheduler import Scheduler
from services.worker.engine.shrinking import ShrinkError
from services.worker.engine.stage_blocks import StageCapacityError
from shared.layout import GroupPlan, MemberPlan, Span
from shared.messages import GenerateStatus

PIPELINE = Route("pipeline@2", (RouteStage("w0", 0, 2), RouteStage("w1", 2, 4)))
HERE = Route("w0@1", (RouteStage("w0", 0, 4),))
THERE = Route("w1@1", (RouteStage("w1", 0, 4),))


def _replica(route: Route, num_blocks: int = 16) -> Scheduler:
    scheduler, _ = make_scheduler(num_blocks=num_blocks, route=route)
    return scheduler


def _running(scheduler: Scheduler, *lengths: int) -> list[Request]:
    """Requests of these prompt lengths that have computed their prompts."""
    requests = [make_request(f"r{i}", n, float(i), max_tokens=20) for i, n in enumerate(lengths)]
    for request in requests:
        assert scheduler.add(request).status is GenerateStatus.ACCEPTED
    while any(request.num_output_tokens == 0 for request in requests):
        _return(scheduler, scheduler.schedule(0.0))
    return requests


def _return(scheduler: Scheduler, output: SchedulerOutput) -> None:
    scheduler.update_from_output(output, [1] * len(output.sampled_requests))


def _grant(scheduler: Scheduler, num_blocks: int = 16) -> None:
    scheduler.blocks.add_capacity("w1", num_blocks)


class TestRoutes:
    """What must travel between two routes."""

    def test_a_drop_moves_what_each_worker_gave_up(self) -> None:
        assert transfers(HERE, PIPELINE) == (Transfer("w0", "w1", 2, 4),)
        assert transfers(THERE, PIPELINE) == (Transfer("w1", "w0", 0, 2),)

    def test_a_restore_brings_it_back(self) -> None:
        assert transfers(PIPELINE, HERE) == (Transfer("w1", "w0", 2, 4),)
        assert transfers(PIPELINE, THERE) == (Transfer("w0", "w1", 0, 2),)

    def test_nothing_moves_along_the_same_stages(self) -> None:
        assert transfers(PIPELINE, Route("again@3", PIPELINE.stages)) == ()

    def test_one_destination_may_have_several_sources(self) -> None:
        other = Route("x", (RouteStage("w2", 0, 1), RouteStage("w3", 1, 4)))
        assert transfers(other, PIPELINE) == (
            Transfer("w2", "w0", 0, 1),
            Transfer("w3", "w0", 1, 2),
            Transfer("w3", "w1", 2, 4),
        )

    def test_a_route_follows_from_a_group_of_the_plan(self) -> None:
        members = tuple(
            MemberPlan(worker_id=s.worker_id, span=Span(start=s.start, end=s.end))
            for s in PIPELINE.stages
        )
        route = Route.of_group(GroupPlan(group_id="g1", members=members), epoch=7)
        assert (route.route_id, route.stages) == ("g1@7", PIPELINE.stages)
        assert (route.leader, route.num_stages) == ("w0", 2)

    @pytest.mark.parametrize(
        "stages",
        [
            (),
            (RouteStage("w0", 1, 4),),
            (RouteStage("w0", 0, 2), RouteStage("w1", 3, 4)),
            (RouteStage("w0", 0, 2), RouteStage("w0", 2, 4)),
            (RouteStage("w0", 0, 0),),
        ],
    )
    def test_a_route_with_gaps_or_repetitions_is_refused(
        self, stages: tuple[RouteStage, ...]
    ) -> None:
        with pytest.raises(ValueError, match="route bad"):
            Route("bad", stages)


class TestShortBatches:
    """Bytes move between batches, so batches are short while requests wait for theirs."""

    @pytest.mark.parametrize("limit", [6, None])
    def test_prefill_is_limited_until_the_kv_is_there(self, limit: int | None) -> None:
        scheduler, _ = make_scheduler(
            num_blocks=64,
            route=HERE,
            max_num_batched_tokens=40,
            exchange_prefill_tokens=limit,  # type: ignore[arg-type]
        )
        (travelling,) = _running(scheduler, 8)
        _grant(scheduler, 64)
        scheduler.relocation.enter(PIPELINE)
        scheduler.relocation.park_running()
        scheduler.add(make_request("new", 200, 1.0))
        assert len(scheduler.relocation.start_exchanges(1)) == 1
        assert (scheduler.schedule(0.0).num_scheduled_tokens <= 6) is (limit is not None)
        scheduler.relocation.filled(travelling.kv_key, "w1")
        batch = scheduler.schedule(0.0)
        assert travelling in [item.request for item in batch.scheduled]


class TestDrop:
    """Running requests wait for their KV; new ones do not."""

    def test_new_requests_run_at_once_while_running_ones_wait(self) -> None:
        scheduler = _replica(HERE)
        (old,) = _running(scheduler, 9)
        scheduler.relocation.enter(PIPELINE)
        scheduler.relocation.park_running()
        _grant(scheduler)
        scheduler.add(make_request("new", 4, 9.0))
        output = scheduler.schedule(0.0)
        assert [item.request.request_id for item in output.scheduled] == ["new"]
        assert output.route == PIPELINE
        assert (old.status, old.num_computed_tokens) == (RequestStatus.PARKED, 9)

    def test_a_request_resumes_when_its_last_piece_is_there(self) -> None:
        scheduler = _replica(HERE)
        (request,) = _running(scheduler, 9)
        target = Route(
            "t", (RouteStage("w0", 0, 1), RouteStage("w1", 1, 2), RouteStage("w2", 2, 4))
        )
        scheduler.relocation.enter(target)
        scheduler.relocation.park_running()
        _grant(scheduler)
        scheduler.blocks.add_capacity("w2", 16)
        (exchange,) = scheduler.relocation.start_exchanges(4)
        assert exchange.pending == {"w1", "w2"}
        key = request.kv_key
        assert not scheduler.relocation.filled(key, "w2")
        assert not scheduler.relocation.filled(key, "w2")  # said twice
        assert not scheduler.schedule(0.0).scheduled
        assert scheduler.relocation.filled(key, "w1")
        assert scheduler.relocation.is_settled
        (item,) = scheduler.schedule(0.0).scheduled
        assert (item.num_computed_tokens, item.num_scheduled_tokens) == (9, 1)

    def test_late_news_of_an_exchange_that_was_given_up_is_ignored(self) -> None:
        scheduler = _replica(HERE)
        (request,) = _running(scheduler, 9)
        scheduler.relocation.enter(PIPELINE)
        scheduler.relocation.park_running()
        _grant(scheduler)
        scheduler.relocation.start_exchanges(1)
        key = request.kv_key
        scheduler.relocation.give_up(request)
        assert (request.status, request.num_computed_tokens) == (RequestStatus.PREEMPTED, 0)
        assert scheduler.blocks.releases.pending() == {"w1": (key,)}
        assert not scheduler.relocation.filled(key, "w1")
        assert request.kv_key != key
        scheduler.check_integrity()

    def test_fewest_bytes_first_and_no_more_than_asked_for(self) -> None:
        scheduler = _replica(HERE, num_blocks=32)
        large, small, middle = _running(scheduler, 16, 4, 9)
        scheduler.relocation.enter(PIPELINE)
        scheduler.relocation.park_running()
        _grant(scheduler, 32)
        started = scheduler.relocation.start_exchanges(2)
        assert [exchange.request for exchange in started] == [small, middle]
        assert large.status is RequestStatus.PARKED

    def test_order_counts_layers_and_then_age(self) -> None:
        requests = [make_request(f"r{i}", 8, float(-i)) for i in range(3)]
        for request in requests:
            request.num_computed_tokens = 8
        thin = Route("thin", (RouteStage("w0", 0, 3), RouteStage("w1", 3, 4)))
        first, second, third = requests
        exchanges = [
            Exchange(first, HERE, PIPELINE),
            Exchange(second, HERE, PIPELINE),
            Exchange(third, HERE, thin),
        ]
        assert [e.request for e in exchange_order(exchanges)] == [third, second, first]

    def test_without_room_and_without_hope_a_request_is_computed_again(self) -> None:
        scheduler = _replica(HERE)
        (request,) = _running(scheduler, 9)
        scheduler.relocation.enter(PIPELINE)
        scheduler.relocation.park_running()
        _grant(scheduler, 2)
        assert scheduler.relocation.start_exchanges(1) == []
        assert request.status is RequestStatus.PREEMPTED
        scheduler.check_integrity()

    def test_a_parked_request_waits_for_room_while_others_run(self) -> None:
        scheduler = _replica(HERE)
        (request,) = _running(scheduler, 9)
        scheduler.relocation.enter(PIPELINE)
        scheduler.relocation.park_running()
        _grant(scheduler, 3)
        scheduler.add(make_request("new", 4, 9.0))
        scheduler.add(make_request("next", 4, 10.0))
        assert not scheduler.schedule(0.0).scheduled  # room for the parked one comes first
        scheduler.blocks.add_capacity("w1", 1)
        output = scheduler.schedule(0.0)
        assert [item.request.request_id for item in output.scheduled] == ["new"]
        assert scheduler.relocation.start_exchanges(1)
        assert request.status is RequestStatus.EXCHANGING

    def test_a_batch_in_flight_forbids_to_park_or_hand_over(self) -> None:
        scheduler = _replica(HERE)
        _running(scheduler, 9)
        output = scheduler.schedule(0.0)
        scheduler.relocation.enter(PIPELINE)
        for forbidden in (scheduler.relocation.park_running, scheduler.relocation.hand_over_all):
            with pytest.raises(RelocationError, match="in flight"):
                forbidden()
        assert not scheduler.relocation.move(next(iter(scheduler.requests.values())), PIPELINE)
        _return(scheduler, output)
        scheduler.relocation.park_running()

    def test_a_route_of_another_leader_is_refused(self) -> None:
        scheduler = _replica(HERE)
        with pytest.raises(RelocationError, match="led by w1"):
            scheduler.relocation.enter(THERE)

    def test_a_second_layout_change_redirects_what_is_on_its_way(self) -> None:
        scheduler = _replica(HERE)
        travelling, _ = _running(scheduler, 9, 12)
        scheduler.relocation.enter(PIPELINE)
        scheduler.relocation.park_running()
        _grant(scheduler)
        scheduler.relocation.start_exchanges(1)
        assert travelling.status is RequestStatus.EXCHANGING
        key = travelling.kv_key
        scheduler.relocation.enter(HERE)
        scheduler.relocation.park_running()
        assert scheduler.blocks.releases.pending() == {"w1": (key,)}
        assert len(scheduler.relocation.start_exchanges(5)) == 2  # nothing needs to travel
        assert scheduler.relocation.is_settled
        scheduler.check_integrity()


class TestHandOver:
    """Requests change their scheduler and keep tokens and KV."""

    def _hand_over(self, scheduler: Scheduler) -> list[Request]:
        """As over a wire: the receiver makes requests of its own."""
        copies = []
        for request in scheduler.relocation.hand_over_all():
            copy = make_request(request.request_id, request.num_prompt_tokens)
            copy.arrival_seconds, copy.status = request.arrival_seconds, request.status
            copy.output_token_ids = list(request.output_token_ids)
            copy.num_computed_tokens, copy.route = request.num_computed_tokens, request.route
            copy.num_preemptions = request.num_preemptions
            copies.append(copy)
        return copies

    def test_everything_leaves_and_only_kv_stays_under_its_key(self) -> None:
        scheduler = _replica(THERE)
        (running,) = _running(scheduler, 9)
        scheduler.add(make_request("waiting", 4, 9.0))
        first, second = scheduler.relocation.hand_over_all()
        assert (first, first.status) == (running, RequestStatus.PARKED)
        assert (second.request_id, second.status) == ("waiting", RequestStatus.WAITING)
        assert not scheduler.requests
        assert scheduler.blocks.stage.keys == (running.kv_key,)
        assert scheduler.blocks.stage.num_used_blocks == 3
        scheduler.check_integrity()

    def test_the_leader_finishes_what_it_adopted(self) -> None:
        follower, leader = _replica(THERE), _replica(HERE)
        _running(follower, 9)
        follower.add(make_request("waiting", 4, 9.0))
        parked, waiting = self._hand_over(follower)
        leader.relocation.enter(PIPELINE)
        for request in (parked, waiting):
            leader.relocation.adopt(request, PIPELINE)
        follower.blocks.stage.lend(follower.blocks.num_free("w1"))
        leader.blocks.add_capacity("w1", 16 - 3)  # the rest came with the request
        assert leader.blocks.capacity("w1") == follower.blocks.stage.num_granted_blocks == 16
        (exchange,) = leader.relocation.start_exchanges(1)
        assert exchange.transfers == (Transfer("w1", "w0", 0, 2),)
        assert len(parked.block_table) == 3
        leader.relocation.filled(parked.kv_key, "w0")
        output = leader.schedule(0.0)
        assert {item.request.request_id for item in output.scheduled} == {"r0", "waiting"}

    def test_a_parked_request_gives_way_to_a_running_one_that_nobody_else_can_help(self) -> None:
        follower, leader = _replica(THERE), _replica(HERE, num_blocks=3)
        leader.relocation.enter(PIPELINE)
        leader.blocks.add_capacity("w1", 2)
        leader.add(make_request("running", 4, 9.0))
        for _ in range(5):
            _return(leader, leader.schedule(0.0))
        _running(follower, 9)
        (parked,) = self._hand_over(follower)
        leader.relocation.adopt(parked, PIPELINE)
        assert leader.relocation.start_exchanges(1) == []  # no room on w0
        assert parked.status is RequestStatus.PARKED
        output = leader.schedule(0.0)  # the ninth token needs a third block on w1
        assert [item.request.request_id for item in output.scheduled] == ["running"]
        assert output.preempted == (parked,)
        leader.check_integrity()

    def test_who_waits_for_room_on_one_stage_does_not_hold_up_who_goes_to_another(self) -> None:
        follower, leader = _replica(THERE), _replica(HERE)
        _running(follower, 14)
        (theirs,) = self._hand_over(follower)
        theirs.request_id = "theirs"
        small, large = _running(leader, 9, 12)
        leader.relocation.enter(PIPELINE)
        leader.relocation.park_running()
        leader.relocation.adopt(theirs, PIPELINE)
        _grant(leader, 3)  # room for the small one only
        started = leader.relocation.start_exchanges(3)
        assert [exchange.request for exchange in started] == [small, theirs]
        leader.relocation.filled(theirs.kv_key, "w0")
        assert leader.relocation.start_exchanges(3) == []
        assert large.status is RequestStatus.PARKED
        _grant(leader, 4)
        assert [exchange.request for exchange in leader.relocation.start_exchanges(3)] == [large]
        leader.check_integrity()

    def test_no_request_is_adopted_twice(self) -> None:
        follower, leader = _replica(THERE), _replica(HERE)
        _running(follower, 9)
        (request,) = self._hand_over(follower)
        leader.relocation.enter(PIPELINE)
        leader.relocation.adopt(request, PIPELINE)
        with pytest.raises(RelocationError, match="here already"):
            leader.relocation.adopt(request, PIPELINE)

    def test_a_running_request_is_not_adopted(self) -> None:
        leader, request = _replica(HERE), make_request("a")
        request.status = RequestStatus.RUNNING
        with pytest.raises(RelocationError, match="adopted as RUNNING"):
            leader.relocation.adopt(request, HERE)


class TestSideBySide:
    """Two layouts at once, as during a restore."""

    def _restored(self, *lengths: int) -> tuple[Scheduler, list[Request]]:
        scheduler, _ = make_scheduler(num_blocks=32, route=PIPELINE)
        _grant(scheduler, 32)
        requests = _running(scheduler, *lengths)
        scheduler.relocation.enter(HERE)
        return scheduler, requests

    def test_new_requests_take_the_new_route_and_routes_take_turns(self) -> None:
        scheduler, _ = self._restored(6, 6)
        scheduler.add(make_request("new", 4, 9.0, max_tokens=20))
        routes = []
        for _ in range(6):
            output = scheduler.schedule(0.0)
            assert {item.request.route for item in output.scheduled} == {output.route}
            routes.append(output.route.route_id)
            _return(scheduler, output)
        assert routes == ["w0@1", "pipeline@2"] * 3

    def test_a_prompt_leaves_the_old_route_between_two_chunks(self) -> None:
        scheduler, _ = make_scheduler(num_blocks=32, route=PIPELINE)
        _grant(scheduler, 32)
        request = make_request("long", 48, max_tokens=20)
        scheduler.add(request)
        first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
        scheduler.relocation.enter(HERE)
        _return(scheduler, first)
        assert not scheduler.schedule(0.0).scheduled  # its third chunk would keep it here
        assert not scheduler.relocation.move(request, HERE)
        _return(scheduler, second)
        assert (request.num_computed_tokens, scheduler.relocation.move(request, HERE)) == (32, True)

    def test_a_moved_request_leaves_no_blocks_behind(self) -> None:
        scheduler, (request, _) = self._restored(6, 6)
        assert not scheduler.relocation.is_settled
        assert scheduler.relocation.move(request, HERE)
        (exchange,) = scheduler.relocation.start_exchanges(1)
        assert exchange.transfers == (Transfer("w1", "w0", 2, 4),)
        assert scheduler.relocation.filled(request.kv_key, "w0")
        assert request.route == HERE
        assert scheduler.blocks.releases.pending() == {"w1": (request.kv_key,)}
        assert scheduler.blocks.num_held(request, "w1") == 0
        scheduler.check_integrity()

    def test_cancel_in_every_state_frees_every_stage(self) -> None:
        scheduler, (exchanging, parked, running) = self._restored(4, 6, 8)
        scheduler.relocation.move(exchanging, HERE)
        scheduler.relocation.move(parked, HERE)
        scheduler.relocation.start_exchanges(1)
        statuses = [request.status.name for request in (exchanging, parked, running)]
        assert statuses == ["EXCHANGING", "PARKED", "RUNNING"]
        keys = {request.kv_key for request in (exchanging, parked, running)}
        for request in (exchanging, parked, running):
            assert scheduler.cancel(request.request_id, 0)
            scheduler.check_integrity()
        assert (scheduler.blocks.num_used("w0"), scheduler.blocks.num_used("w1")) == (0, 0)
        assert set(scheduler.blocks.releases.pending()["w1"]) == keys


class TestReleases:
    """Stages are told whose blocks to free until they are known to have done it."""

    def test_batches_carry_released_keys_until_one_returns(self) -> None:
        scheduler, _ = make_scheduler(num_blocks=32, route=PIPELINE)
        _grant(scheduler, 32)
        gone, *_ = _running(scheduler, 4, 6, 8)
        key = gone.kv_key
        scheduler.cancel(gone.request_id, 0)
        first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
        assert first.released == second.released == {"w1": (key,)}
        scheduler.fail_batch(first, "lost")
        assert key in scheduler.blocks.releases.pending()["w1"]
        _return(scheduler, second)
        assert key not in scheduler.blocks.releases.pending()["w1"]


class TestStage:
    """What a worker lends to the scheduler of another."""

    def test_own_requests_leave_the_granted_blocks_alone(self) -> None:
        scheduler = _replica(HERE, num_blocks=8)
        scheduler.blocks.stage.lend(5)
        assert scheduler.blocks.capacity("w0") == 3
        scheduler.add(make_request("large", 16))
        assert not scheduler.schedule(0.0).scheduled
        scheduler.add(make_request("small", 8, -1.0))
        assert scheduler.schedule(0.0).num_scheduled_tokens == 8

    def test_no_more_is_lent_than_is_free_and_no_more_used_than_is_lent(self) -> None:
        scheduler = _replica(HERE, num_blocks=8)
        stage, key = scheduler.blocks.stage, make_request("a").kv_key
        with pytest.raises(StageCapacityError, match="only 8 are free"):
            stage.lend(9)
        stage.lend(2)
        assert len(stage.extend(key, 2 * BLOCK_SIZE)) == 2
        with pytest.raises(StageCapacityError, match="2 of 2 granted"):
            stage.extend(key, 2 * BLOCK_SIZE + 1)
        with pytest.raises(StageCapacityError, match="given back"):
            stage.take_back(1)
        assert stage.release(key)
        assert not stage.release(key)
        stage.take_back(2)
        assert scheduler.blocks.capacity("w0") == 8
        scheduler.check_integrity()

    def test_when_the_group_is_gone_everything_is_free(self) -> None:
        scheduler = _replica(HERE, num_blocks=8)
        scheduler.blocks.stage.lend(4)
        scheduler.blocks.stage.extend(make_request("a").kv_key, 5)
        scheduler.blocks.stage.release_all()
        assert (scheduler.blocks.num_free("w0"), scheduler.blocks.capacity("w0")) == (8, 8)


class TestShrink:
    """A pool gives memory back to weights."""

    def _pipeline(self, *lengths: int) -> tuple[Scheduler, list[Request]]:
        scheduler, _ = make_scheduler(num_blocks=16, route=PIPELINE, max_model_len=24)
        _grant(scheduler, 16)
        return scheduler, _running(scheduler, *lengths)

    def test_what_fits_is_moved_and_nobody_preempted(self) -> None:
        scheduler, requests = self._pipeline(12, 12)
        scheduler.cancel("r0", 0)
        plan = scheduler.plan_shrink({"w0": 6, "w1": 8})
        assert plan.preempted == ()
        result = scheduler.shrink(plan)
        assert result.given_back == {"w1": 8}
        assert all(move.destination < 6 for move in result.moves)
        assert max(requests[1].block_table) < 6
        assert (scheduler.blocks.capacity("w0"), scheduler.blocks.capacity("w1")) == (6, 8)
        scheduler.check_integrity()

    def test_the_youngest_give_way_and_no_more_than_needed(self) -> None:
        scheduler, (old, middle, young) = self._pipeline(12, 12, 12)
        plan = scheduler.plan_shrink({"w1": 8})
        assert plan.preempted == (young,)
        scheduler.shrink(plan)
        statuses = [request.status.name for request in (old, middle, young)]
        assert statuses == ["RUNNING", "RUNNING", "PREEMPTED"]
        scheduler.check_integrity()

    def test_room_for_one_request_must_remain(self) -> None:
        scheduler, _ = self._pipeline(4)
        with pytest.raises(ShrinkError, match="24 tokens needs 6"):
            scheduler.plan_shrink({"w0": 5})
        with pytest.raises(ShrinkError, match="from 16 blocks to 17"):
            scheduler.plan_shrink({"w1": 17})

    def test_not_with_a_batch_in_flight_nor_by_an_old_plan(self) -> None:
        scheduler, _ = self._pipeline(12)
        plan = scheduler.plan_shrink({"w0": 6})
        output = scheduler.schedule(0.0)
        with pytest.raises(ShrinkError, match="in flight"):
            scheduler.shrink(plan)
        _return(scheduler, output)
        for i in range(3):
            scheduler.add(make_request(f"n{i}", 12, 5.0 + i))
        _return(scheduler, scheduler.schedule(0.0))
        with pytest.raises(ShrinkError, match="out of date"):
            scheduler.shrink(plan)


class TestLoss:
    """A member of the group is gone."""

    def test_requests_with_kv_there_are_lost_and_others_go_on(self) -> None:
        scheduler, _ = make_scheduler(num_blocks=32, route=PIPELINE)
        _grant(scheduler, 32)
        in_flight, cancelled, moved = _running(scheduler, 4, 6, 8)
        scheduler.relocation.enter(HERE)
        scheduler.relocation.move(moved, HERE)
        scheduler.relocation.start_exchanges(1)
        scheduler.relocation.filled(moved.kv_key, "w0")
        outputs = [scheduler.schedule(0.0), scheduler.schedule(0.0), scheduler.schedule(0.0)]
        scheduler.cancel(cancelled.request_id, 0)
        assert scheduler.lose_worker("w1") == [in_flight]
        assert list(scheduler.requests.values()) == [moved]
        for output in outputs:
            if output.route == HERE:
                _return(scheduler, output)
            else:
                with pytest.raises(ValueError, match="not in flight"):
                    _return(scheduler, output)
        assert scheduler.num_batches_in_flight == 0
        assert scheduler.blocks.releases.pending() == {}
        scheduler.check_integrity()

    def test_a_request_whose_kv_was_to_go_there_is_computed_again(self) -> None:
        scheduler = _replica(HERE)
        (request,) = _running(scheduler, 9)
        scheduler.relocation.enter(PIPELINE)
        scheduler.relocation.park_running()
        _grant(scheduler)
        scheduler.relocation.start_exchanges(1)
        scheduler.relocation.enter(HERE)
        assert scheduler.lose_worker("w1") == []
        assert request.status is RequestStatus.PREEMPTED
        scheduler.check_integrity()

    def test_a_broken_group_loses_all(self) -> None:
        scheduler, blocks = make_scheduler(num_blocks=32, route=PIPELINE)
        _grant(scheduler, 32)
        running = _running(scheduler, 4, 6)
        waiting = make_request("waiting", 4, 9.0)
        scheduler.schedule(0.0)
        scheduler.add(waiting)
        assert set(map(id, scheduler.lose_all())) == set(map(id, (*running, waiting)))
        assert all(request.status is RequestStatus.FINISHED_ERROR for request in running)
        assert (scheduler.num_batches_in_flight, blocks.num_used_blocks) == (0, 0)
        assert not scheduler.requests
        scheduler.add(make_request("again", 4, 10.0))
        scheduler.relocation.enter(HERE)
        assert run_step(scheduler, PagedModel(BLOCK_SIZE))
