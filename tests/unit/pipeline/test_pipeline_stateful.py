"""Planner, transitions, engines and memory, with every message delivered in any order.

Also with devices whose tokens come late, so that batches are in flight whenever something happens.
Orders, requests, cancellations, planners that take over, plans seen late, frames that overtake each
other, in random order. Always: every group that serves has every layer, epochs only rise, every
chunk and block has one owner. In the end: everybody settles, and no request is lost or differs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from services.planner.inputs import Timing
from services.worker.engine.request import Request
from services.worker.kernels.cpu import CpuKernels
from shared.layout import Plan
from shared.messages import AdminAction, AdminRequest
from tests.planner_simulator import SimCluster
from tests.tiny_models import TinyModels
from tests.unit.model.model_helpers import open_runner
from tests.unit.pipeline.pipeline_engine import make_requests, undisturbed
from tests.unit.pipeline.simulated_workers import SimLink, SimWorker

NUMBERS = st.integers(0, 3)
NUM_REQUESTS, MAX_TOKENS = 14, 32
MEMORY_BYTES = 1024 * 1024
NEVER = 1e9
#: Rounds after which everything that was begun must be over.
CALM_ROUNDS = 3000


class PipelineMachine(RuleBasedStateMachine):
    """Up to four workers, one planner after the other."""

    model: Path
    kernels: CpuKernels
    expected: dict[str, list[int]]

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.stack = ExitStack()
        self.links: list[SimLink] = []
        self.workers: dict[str, SimWorker] = {}
        self.unasked = make_requests(NUM_REQUESTS, MAX_TOKENS)
        self.asked: list[Request] = []
        self.unwanted: set[str] = set()
        self.planner = SimCluster(timing=Timing(3.0, 5.0, NEVER, NEVER), now=time.time() + NEVER)

    @initialize(count=st.integers(2, 4), late=st.booleans())
    def begin(self, count: int, late: bool) -> None:
        for number in range(count):
            runner = self.stack.enter_context(open_runner(self.model, self.kernels, MEMORY_BYTES))
            name = f"w{number}"
            self.workers[name] = SimWorker(name, runner, self.workers, self.links, late=late)
            self.stack.callback(self.workers[name].engine.member.close)
        self.planner.workers = self.workers  # type: ignore[assignment]
        self.planner.tick(0.1)
        for worker in self.workers.values():
            worker.see(self.planner.plan, self.loop)
        for number in range(count):
            self.ask(number, 2)

    # --- what may happen -------------------------------------------------------------------------

    @rule(
        action=st.sampled_from([AdminAction.DROP, AdminAction.DROP, AdminAction.RESTORE]),
        numbers=st.lists(NUMBERS, max_size=3, unique=True),
        rounds=st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 20]),
    )
    def order(self, action: AdminAction, numbers: list[int], rounds: int) -> None:
        workers = tuple(self.worker(number).worker_id for number in numbers)
        self.planner.wish = AdminRequest(action=action, workers=tuple(dict.fromkeys(workers)))
        self.planner.tick(0.01)
        for _ in range(rounds):
            self.go_on()

    @rule(seconds=st.sampled_from([0.01, 0.01, 0.01, 6.0]))
    def decide(self, seconds: float) -> None:
        self.planner.tick(seconds)

    @rule()
    def change_planner(self) -> None:
        self.planner.change_leader()
        self.planner.tick(0.01)

    @rule(number=NUMBERS)
    def see_plan(self, number: int) -> None:
        self.worker(number).see(self.planner.plan, self.loop)

    @rule(number=NUMBERS, turns=st.integers(1, 4), most_commands=st.integers(0, 4))
    def compute(self, number: int, turns: int, most_commands: int) -> None:
        for _ in range(turns):
            self.worker(number).turn(most_commands)

    @rule(number=NUMBERS)
    def hear(self, number: int) -> None:
        self.worker(number).hear(self.loop, self.unwanted)

    @rule(pick=st.integers(0, 50), count=st.integers(1, 4), bulk=st.booleans())
    def deliver(self, pick: int, count: int, bulk: bool) -> None:
        busy = [link for link in self.links if link.waiting]
        for _ in range(count if busy else 0):
            busy[pick % len(busy)].deliver(bulk=bulk)

    @rule(rounds=st.integers(1, 10))
    def let_all_go_on(self, rounds: int) -> None:
        for _ in range(rounds):
            self.go_on()

    @rule(number=NUMBERS, count=st.integers(1, 3))
    def ask(self, number: int, count: int) -> None:
        """Clients come; workers that lead nobody refuse them, as they do routers."""
        worker = self.worker(number)
        for _ in range(min(count, len(self.unasked))):
            if worker.placement.is_leader:
                request = self.unasked.pop()
                assert worker.engine.core.add(request) == []
                self.asked.append(request)

    @rule(pick=st.integers(0, NUM_REQUESTS))
    def cancel(self, pick: int) -> None:
        """A client goes away; a request between two schedulers is told of it when it arrives."""
        if not self.asked:
            return
        key = self.asked[pick % len(self.asked)].key
        self.unwanted.add(key.request_id)
        self.drop_unwanted()

    # --- what must hold --------------------------------------------------------------------------

    @invariant()
    def versions_only_rise(self) -> None:
        assert self.planner.versions == sorted(set(self.planner.versions))

    @invariant()
    def every_layer_has_an_owner_in_every_group(self) -> None:
        if self.planner.stored is None:
            return
        for group in self.planner.stored.serving_groups:
            for member in group.members:
                assert self.workers[member.worker_id].holds(member.span)

    @invariant()
    def chunks_and_blocks_have_one_owner(self) -> None:
        for worker in self.workers.values():
            worker.engine.scheduler.check_integrity()
            worker.engine.runner.pool.check_integrity()

    def teardown(self) -> None:
        """All clients get the tokens they would have got alone; all workers become whole again."""
        try:
            if self.workers:
                self.calm_down(self.has_served)
                self.planner.wish = AdminRequest(action=AdminAction.RESTORE)
                self.calm_down(self.is_whole)
                self.check_tokens()
        finally:
            self.stack.close()
            self.loop.close()

    # --- helpers ---------------------------------------------------------------------------------

    def worker(self, number: int) -> SimWorker:
        return list(self.workers.values())[number % len(self.workers)]

    def go_on(self) -> None:
        """Everything that can happen happens, once."""
        plan: Plan = self.planner.plan
        for worker in self.workers.values():
            worker.see(plan, self.loop)
            worker.turn(most_commands=100)
            worker.hear(self.loop, self.unwanted)
        for link in self.links:
            while link.deliver(bulk=False) or link.deliver(bulk=True):
                pass
        self.drop_unwanted()
        self.planner.tick(0.01)

    def calm_down(self, is_over: Callable[[], bool]) -> None:
        for _ in range(CALM_ROUNDS):
            if is_over():
                return
            self.go_on()
        raise AssertionError(f"{self.planner.plan}\n{[str(w.ack) for w in self.workers.values()]}")

    def has_served(self) -> bool:
        is_still = all(worker.is_still for worker in self.workers.values())
        is_empty = not any(worker.engine.scheduler.requests for worker in self.workers.values())
        return is_still and is_empty and self.planner.plan.change is None

    def is_whole(self) -> bool:
        blocks = [worker.engine.scheduler.blocks for worker in self.workers.values()]
        return (
            self.planner.plan.change is None
            and all(len(group.members) == 1 for group in self.planner.plan.groups)
            and all(each.num_local_used == each.stage.num_granted_blocks == 0 for each in blocks)
        )

    def drop_unwanted(self) -> None:
        for request_id in self.unwanted:
            for worker in self.workers.values():
                worker.engine.core.cancel(request_id, 0)

    def check_tokens(self) -> None:
        items = [item for worker in self.workers.values() for item in worker.items]
        for request in self.asked:
            if request.request_id in self.unwanted:
                continue
            own = [item for item in items if item.request_id == request.request_id]
            tokens: list[int] = []
            for item in sorted(own, key=lambda item: item.index):
                assert (item.error, item.index) == ("", len(tokens))
                tokens += item.token_ids
            assert tokens == self.expected[request.request_id]


def test_pipelines_under_any_order_of_messages(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    directory = tiny_models.directory("llama")
    requests = make_requests(NUM_REQUESTS, MAX_TOKENS)

    class Machine(PipelineMachine):
        model, expected = directory, undisturbed(directory, kernels, requests)

    Machine.kernels = kernels
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=30,
            stateful_step_count=25,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
