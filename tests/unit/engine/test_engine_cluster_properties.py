"""Drops, restores, exchanges, cancels and preemptions in any order: nothing leaks, all finishes.

Four workers, merged to pairs and to one group of four and split again, with batches in flight,
exchanges whose pieces arrive in any order, requests that move between schedulers, and orders to
free blocks that arrive late. Every stage checks the KV it reads (see `cluster_model.py`).
"""

from __future__ import annotations

from collections import Counter
from random import Random

from cluster_model import LAYOUTS, Cluster, Flight
from engine_helpers import BLOCK_SIZE, expected_output, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.config import ChunkPolicy, SchedulerConfig
from services.worker.engine.relocation import Relocation
from services.worker.engine.request import Request, RequestStatus
from shared.messages import GenerateStatus

MAX_MODEL_LEN = 24
MIN_BLOCKS = MAX_MODEL_LEN // BLOCK_SIZE


class History:
    """A cluster, what is done to it, and what must hold after each deed.

    Attributes:
        seen: how often what happened, so that a test can see that it tests something.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        watermark = random.choice([0.0, 0.2])
        config = SchedulerConfig(
            max_num_batched_tokens=random.randint(4, 16),
            max_num_seqs=4,
            max_model_len=MAX_MODEL_LEN,
            max_num_waiting_requests=8,
            watermark=watermark,
            recovery_watermark=watermark,
            chunk_policy=random.choice(list(ChunkPolicy)),
            min_prefill_tokens=2,
            overlaps=random.choice([True, False]),
        )
        self.cluster = Cluster(random.randint(MIN_BLOCKS, 14), random.randint(0, 6), config)
        self.budget = config.max_num_batched_tokens
        self.overlaps = config.overlaps
        self.now = 0.0
        self.accepted: list[Request] = []
        self.cancelled: set[str] = set()
        self.failed: set[str] = set()
        self.tokens: dict[str, list[int]] = {}
        self.seen: Counter[str] = Counter()

    # --- requests and batches --------------------------------------------------------------------

    def arrive(self) -> None:
        for _ in range(self.random.randint(1, 8)):
            self.now += 1.0
            name, max_tokens = f"r{len(self.accepted)}", self.random.randint(1, 12)
            num_prompt_tokens = self.random.randint(1, 20)
            request = make_request(name, num_prompt_tokens, self.now, max_tokens=max_tokens)
            leader = self.random.choice(self.cluster.leaders)
            if self.cluster.scheduler(leader).add(request).status is GenerateStatus.ACCEPTED:
                self.accepted.append(request)

    def schedule(self) -> None:
        self._schedule(self.random.choice(self.cluster.leaders))

    def step(self) -> None:
        """Start a batch wherever one may start, and let all move on by a stage."""
        for leader in self.cluster.leaders:
            self._schedule(leader)
        for flight in self.cluster.due_flights:
            self._advance(flight)

    def advance(self) -> None:
        if self.cluster.flights:
            self._advance(self.random.choice(self.cluster.due_flights))

    def fail(self) -> None:
        if self.cluster.flights:
            results = self.cluster.fail(self.random.choice(self.cluster.due_flights))
            self.failed.update(result.request.request_id for result in results)

    def cancel(self) -> None:
        live = [request for request in self.accepted if not request.status.is_finished]
        if not live:
            return
        request = self.random.choice(live)
        self.seen[f"cancel {request.status.name}"] += 1
        self.cancelled.add(request.request_id)
        cancels = [
            worker.scheduler.cancel(request.request_id, request.attempt)
            for worker in self.cluster.workers.values()
        ]
        assert cancels.count(True) == 1

    def _schedule(self, leader: str) -> None:
        in_flight = [i for flight in self.cluster.flights for i in flight.output.scheduled]
        present = {id(item.request) for item in in_flight}
        sampling = {id(item.request) for item in in_flight if item.wants_token}
        output = self.cluster.schedule(leader, self.now)
        self.seen[f"batch on {output.route.num_stages}"] += bool(output.scheduled)
        self.seen["preempted"] += len(output.preempted)
        assert output.num_scheduled_tokens <= self.budget
        assert all(item.request.route == output.route for item in output.scheduled)
        again = [item.request for item in output.scheduled if id(item.request) in present]
        if output.route.num_stages > 1:  # prompts in chunks; the token of the last one is not known
            assert not any(id(request) in sampling for request in again)
            self.seen["next chunk"] += len(again)
        else:
            assert self.overlaps or not again
        flights = [f for f in self.cluster.flights if f.output.route == output.route]
        is_ahead = len(flights) > output.route.num_stages
        assert not is_ahead or (self.overlaps and len(flights) == 2)
        self.seen["ahead"] += is_ahead
        others = {f.output.route.route_id for f in self.cluster.flights if f.leader == leader}
        self.seen["routes side by side"] += len(others) > 1

    def _advance(self, flight: Flight) -> None:
        for result in self.cluster.advance(flight):
            received = self.tokens.setdefault(result.request.request_id, [])
            assert result.index == len(received)
            received.extend(result.new_token_ids)

    # --- transitions -----------------------------------------------------------------------------

    def change_layout(self) -> None:
        if not self.cluster.is_settled:
            return
        while self.cluster.flights:
            self._advance(self.cluster.flights[0])
        before = self.cluster.group_size
        after = self.random.choice([size for size in LAYOUTS if size != before])
        self.seen[f"{before} to {after}"] += 1
        if after > before:
            self.cluster.drop(after)
        else:
            self.cluster.restore(after)

    def start_exchanges(self) -> None:
        for leader in self.cluster.leaders:
            if self._relocation(leader).exchanges:
                num_started = self.cluster.start_exchanges(leader, self.random.randint(1, 3))
                self.seen["exchange"] += num_started

    def deliver(self) -> None:
        if self.cluster.pieces:
            self.cluster.deliver(self.random.choice(self.cluster.pieces))

    def give_up(self) -> None:
        parked = [
            (leader, exchange)
            for leader in self.cluster.leaders
            for exchange in self._relocation(leader).exchanges.values()
        ]
        if parked:
            leader, exchange = self.random.choice(parked)
            self.seen[f"give up {exchange.request.status.name}"] += 1
            self._relocation(leader).give_up(exchange.request)

    def relocate(self) -> None:
        strays = [(w, request) for w in self.cluster.workers for request in self._strays(w)]
        if strays:
            leader, request = self.random.choice(strays)
            home = self.random.choice(self.cluster.leaders)
            if self.cluster.relocate(leader, request, home):
                self.seen["moved here" if home == leader else "moved to another"] += 1

    def rebalance(self) -> None:
        self.cluster.rebalance()

    def flush(self) -> None:
        self.cluster.flush(self.random.choice(sorted(self.cluster.workers)))

    def _strays(self, leader: str) -> list[Request]:
        """Running requests of `leader` that are on a route of the layout before."""
        unsettled = self._relocation(leader).unsettled_requests
        return [request for request in unsettled if request.status is RequestStatus.RUNNING]

    def _relocation(self, leader: str) -> Relocation:
        return self.cluster.scheduler(leader).relocation

    # --- what must hold --------------------------------------------------------------------------

    def check(self) -> None:
        self.cluster.check()
        known = [
            request.key
            for worker in self.cluster.workers.values()
            for request in worker.scheduler.requests.values()
        ]
        assert len(known) == len(set(known))
        for request in self.accepted:
            assert 0 <= request.num_computed_tokens <= request.num_tokens
            assert request.status.is_finished == (request.key not in known)

    def finish(self) -> None:
        """Whatever was going on, everything that was accepted finishes and all blocks are free."""
        for _ in range(2000):
            if not any(w.scheduler.requests for w in self.cluster.workers.values()):
                break
            self._go_on()
        self.check()
        for worker_id, worker in self.cluster.workers.items():
            stuck = [(r.request_id, r.status) for r in worker.scheduler.requests.values()]
            assert not stuck
            self.cluster.flush(worker_id)
        for worker in self.cluster.workers.values():
            assert worker.pool.num_used_blocks == 0
        for request in self.accepted:
            self._check_output(request)

    def _go_on(self) -> None:
        """What the transition code of a worker does all the time."""
        for leader in self.cluster.workers:
            for request in self._strays(leader):
                self.cluster.relocate(leader, request, self.random.choice(self.cluster.leaders))
        self.start_exchanges()
        for piece in list(self.cluster.pieces):
            self.cluster.deliver(piece)
        self.cluster.rebalance()
        self.step()

    def _check_output(self, request: Request) -> None:
        expected = expected_output(request, MAX_MODEL_LEN)
        if request.request_id in self.failed:
            assert request.status is RequestStatus.FINISHED_ERROR
        elif request.request_id in self.cancelled:
            assert request.status is RequestStatus.FINISHED_ABORTED
        else:
            assert request.status is RequestStatus.FINISHED_LENGTH
            assert self.tokens[request.request_id] == expected
        assert request.output_token_ids == expected[: request.num_output_tokens]


#: What may happen, and how often in comparison.
ACTIONS = {
    History.arrive: 4,
    History.step: 12,
    History.schedule: 4,
    History.advance: 4,
    History.fail: 1,
    History.cancel: 1,
    History.change_layout: 3,
    History.start_exchanges: 6,
    History.deliver: 12,
    History.give_up: 1,
    History.relocate: 6,
    History.rebalance: 2,
    History.flush: 2,
}


@given(
    seed=st.integers(0, 1 << 32),
    actions=st.lists(st.sampled_from([a for a, n in ACTIONS.items() for _ in range(n)])),
)
@settings(max_examples=100)
def test_short_histories(seed: int, actions: list) -> None:  # type: ignore[type-arg]
    history = History(Random(seed))
    history.arrive()
    for action in actions:
        action(history)
        history.check()
    history.finish()


def test_long_histories() -> None:
    """And that they contain what they are to test."""
    seen: Counter[str] = Counter()
    for seed in range(24):
        history = History(Random(seed))
        for action in history.random.choices(list(ACTIONS), list(ACTIONS.values()), k=300):
            action(history)
            history.check()
        history.finish()
        seen += history.seen
    transitions = {f"{a} to {b}" for a in LAYOUTS for b in LAYOUTS if a != b}
    states = {"RUNNING", "WAITING", "PREEMPTED", "PARKED", "EXCHANGING"}
    expected = transitions | {f"cancel {state}" for state in states}
    expected |= {"exchange", "give up PARKED", "give up EXCHANGING", "preempted"}
    expected |= {"moved here", "moved to another", "routes side by side", "ahead", "next chunk"}
    assert expected <= seen.keys()
