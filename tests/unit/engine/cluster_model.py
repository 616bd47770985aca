"""Four workers with real schedulers and KV that is really kept, for tests of drop and restore.

Each worker keeps the KV of four layers by block. Every stage of a batch writes its tokens into the
blocks it was given and reads all earlier ones back; an exchange copies, block by block. So a block
shared, lost, freed too early or not exchanged shows as KV that is not the request's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine_helpers import BLOCK_SIZE, next_token

from services.worker.engine.block_manager import BlockManager, BlockMove
from services.worker.engine.config import SchedulerConfig
from services.worker.engine.cost_model import CostModel
from services.worker.engine.exchange import Exchange
from services.worker.engine.outputs import SchedulerOutput, StepResult
from services.worker.engine.request import KvKey, Request, RequestStatus
from services.worker.engine.routes import Route, RouteStage, Transfer
from services.worker.engine.scheduler import Scheduler

#: Layouts by group size. The larger ones follow from the smaller ones by dropping alone.
LAYOUTS: dict[int, tuple[tuple[str, ...], ...]] = {
    1: (("w0",), ("w1",), ("w2",), ("w3",)),
    2: (("w0", "w1"), ("w2", "w3")),
    4: (("w0", "w2", "w1", "w3"),),
}
NUM_LAYERS = 4
#: What an old leader keeps to let its requests grow until they are moved.
MIN_KEPT_BLOCKS = 6
COST_MODEL = CostModel(alpha=0.01, beta=1.0, gamma=3.0, lam=2.0)


def route_of(members: tuple[str, ...], epoch: int) -> Route:
    """Equal slices of the layers."""
    step = NUM_LAYERS // len(members)
    stages = tuple(
        RouteStage(worker_id, i * step, (i + 1) * step) for i, worker_id in enumerate(members)
    )
    return Route(f"{'-'.join(members)}@{epoch}", stages)


@dataclass
class Piece:
    """One transfer of an exchange that is under way."""

    leader: str
    exchange: Exchange
    key: KvKey
    transfer: Transfer


@dataclass
class Flight:
    """A batch and the next of its stages."""

    leader: str
    output: SchedulerOutput
    stage: int = 0


class Worker:
    """One scheduler, one pool, and the KV in its blocks."""

    def __init__(self, worker_id: str, route: Route, num_blocks: int, config: SchedulerConfig):
        self.worker_id = worker_id
        self.pool = BlockManager(num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(config, self.pool, route, COST_MODEL)
        self.kv: dict[tuple[int, int], int] = {}  # (layer, slot) -> token id

    def write(self, table: list[int], layer: int, position: int, token_id: int) -> None:
        self.kv[layer, _slot(table, position)] = token_id

    def read(self, table: list[int], layer: int, num_tokens: int) -> list[int | None]:
        return [self.kv.get((layer, _slot(table, i))) for i in range(num_tokens)]

    def apply_moves(self, moves: Iterable[BlockMove]) -> None:
        for source, destination in moves:
            for layer in range(NUM_LAYERS):
                for offset in range(BLOCK_SIZE):
                    token_id = self.kv.get((layer, source * BLOCK_SIZE + offset))
                    if token_id is not None:
                        self.kv[layer, destination * BLOCK_SIZE + offset] = token_id


class Cluster:
    """The workers, the batches and the exchanges between them."""

    def __init__(self, num_blocks: int, gain_blocks: int, config: SchedulerConfig) -> None:
        self.config = config
        self.num_blocks = num_blocks
        self.gain_blocks = gain_blocks
        self.epoch = 0
        self.group_size = 1
        self.routes = [route_of(members, 0) for members in LAYOUTS[1]]
        self.workers = {
            route.leader: Worker(route.leader, route, num_blocks, config) for route in self.routes
        }
        self.flights: list[Flight] = []  # of a route, oldest first
        self.pieces: list[Piece] = []

    # --- serving ---------------------------------------------------------------------------------

    @property
    def leaders(self) -> list[str]:
        return [route.leader for route in self.routes]

    def scheduler(self, worker_id: str) -> Scheduler:
        return self.workers[worker_id].scheduler

    def schedule(self, leader: str, now: float) -> SchedulerOutput:
        """Make a batch; what was released before travels with it."""
        scheduler = self.scheduler(leader)
        output = scheduler.schedule(now)
        if output.scheduled:
            self.flights.append(Flight(leader, output))
        return output

    @property
    def due_flights(self) -> list[Flight]:
        """Batches whose next stage may compute them: stages keep the order of a route."""
        due: list[Flight] = []
        behind: dict[Route, int] = {}  # the stage of the batch before
        for flight in self.flights:
            route = flight.output.route
            if flight.stage < behind.get(route, route.num_stages):
                due.append(flight)
            behind[route] = flight.stage
        return due

    def advance(self, flight: Flight) -> list[StepResult]:
        """Compute the next stage of a batch; after the last one it returns."""
        route = flight.output.route
        stage = route.stages[flight.stage]
        self._free(stage.worker_id, flight.output.released.get(stage.worker_id, ()))
        sampled = [
            token_id
            for item in flight.output.scheduled
            if (token_id := self._compute(flight.leader, stage, item)) is not None
        ]
        flight.stage += 1
        if flight.stage < route.num_stages:
            return []
        self.flights.remove(flight)
        return self.scheduler(flight.leader).update_from_output(flight.output, sampled)

    def fail(self, flight: Flight) -> list[StepResult]:
        """A stage could not compute the batch."""
        self.flights.remove(flight)
        return self.scheduler(flight.leader).fail_batch(flight.output, "out of memory")

    def _compute(self, leader: str, stage: RouteStage, item) -> int | None:  # type: ignore[no-untyped-def]
        request, end = item.request, item.num_computed_tokens + item.num_scheduled_tokens
        worker, table = self.workers[stage.worker_id], request.block_table
        if stage.worker_id != leader:
            table = worker.scheduler.blocks.stage.extend(request.kv_key, end)
        tokens = request.token_ids(0, end)
        if request.status is RequestStatus.ENDING:  # a batch before may be lost
            assert len(table) * BLOCK_SIZE >= end
            return 0 if item.wants_token else None
        for layer in range(stage.start, stage.end):
            for position in range(item.num_computed_tokens, end):
                worker.write(table, layer, position, tokens[position])
            assert worker.read(table, layer, end) == tokens, "the KV is not the request's own"
        return next_token(tokens) if item.wants_token else None

    def _free(self, worker_id: str, keys: tuple[KvKey, ...]) -> None:
        for key in keys:
            self.workers[worker_id].scheduler.blocks.stage.release(key)

    def flush(self, leader: str) -> None:
        """Deliver what is to be freed without waiting for a batch."""
        releases = self.scheduler(leader).blocks.releases
        for worker_id, keys in releases.pending().items():
            self._free(worker_id, keys)
            releases.confirm({worker_id: keys})

    # --- the exchange ----------------------------------------------------------------------------

    def start_exchanges(self, leader: str, max_in_progress: int) -> int:
        """Begin exchanges; returns how many."""
        started = self.scheduler(leader).relocation.start_exchanges(max_in_progress)
        self.flush(leader)
        for exchange in started:
            key = exchange.request.kv_key
            self.pieces += [Piece(leader, exchange, key, t) for t in exchange.transfers]
        return len(started)

    def deliver(self, piece: Piece) -> None:
        """A piece of KV arrives; late ones, of exchanges that are no more, are discarded."""
        self.pieces.remove(piece)
        exchange, transfer, key = piece.exchange, piece.transfer, piece.key
        request = exchange.request
        if request.kv_key != key or request.status is not RequestStatus.EXCHANGING:
            return
        num_tokens = request.num_computed_tokens
        source = self._table(piece.leader, request, transfer.source)
        destination = request.block_table
        worker = self.workers[transfer.destination]
        if transfer.destination != piece.leader:
            destination = worker.scheduler.blocks.stage.extend(key, num_tokens)
        for layer in range(transfer.start, transfer.end):
            tokens = self.workers[transfer.source].read(source, layer, num_tokens)
            assert tokens == request.token_ids(0, num_tokens), "the origin lost KV"
            for position, token_id in enumerate(tokens):
                worker.write(destination, layer, position, token_id)
        siblings = [
            p
            for p in self.pieces
            if p.exchange is exchange and p.transfer.destination == transfer.destination
        ]
        if not siblings:
            self.scheduler(piece.leader).relocation.filled(key, transfer.destination)

    def _table(self, leader: str, request: Request, worker_id: str) -> list[int]:
        if worker_id == leader:
            return request.block_table
        return self.workers[worker_id].scheduler.blocks.stage.block_table(request.kv_key)

    # --- the layout changes ----------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """True if nobody travels, and nobody holds or may book what the layout does not give."""
        return all(
            worker.scheduler.relocation.is_settled
            and not any(worker.scheduler.blocks.capacity(w) for w in self._outsiders(worker_id))
            for worker_id, worker in self.workers.items()
        )

    def _outsiders(self, worker_id: str) -> list[str]:
        """Workers that are no stage of a route that `worker_id` leads in this layout."""
        members = {worker_id}
        for route in self.routes:
            if route.leader == worker_id:
                members |= set(route.worker_ids)
        return sorted(self.workers.keys() - members)

    def capacity_of(self, group_size: int) -> int:
        """Blocks of a worker in a group of this size."""
        return self.num_blocks + self.gain_blocks * (group_size - 1)

    def drop(self, group_size: int) -> None:
        """Merge groups; no batch may be in flight."""
        old_leaders = self.leaders
        self._enter_layout(group_size)
        handed = {
            worker_id: self.scheduler(worker_id).relocation.hand_over_all()
            for worker_id in old_leaders
            if worker_id not in self.leaders
        }
        self.rebalance()
        for route in self.routes:
            leader = self.scheduler(route.leader)
            leader.relocation.enter(route)
            for worker_id in route.worker_ids:
                for request in handed.get(worker_id, ()):
                    leader.relocation.adopt(request, route)
            for worker_id in route.worker_ids:
                self.scheduler(worker_id).blocks.grow(self.capacity_of(group_size))
                if worker_id != route.leader:
                    self._lend(worker_id, route.leader)
            leader.relocation.park_running()

    def _lend(self, worker_id: str, leader: str) -> None:
        """Grant all that is free."""
        blocks = self.scheduler(worker_id).blocks
        num_blocks = blocks.num_free(worker_id)
        blocks.stage.lend(num_blocks)
        self.scheduler(leader).blocks.add_capacity(worker_id, num_blocks)

    def restore(self, group_size: int) -> None:
        """Split groups; no batch may be in flight. Requests stay on their routes until moved."""
        for worker_id in self.workers:
            self.flush(worker_id)
        for route in self.routes:
            self._shrink(route, self.capacity_of(group_size))
        self._enter_layout(group_size)
        for route in self.routes:
            self.scheduler(route.leader).relocation.enter(route)
        self.rebalance()

    def _enter_layout(self, group_size: int) -> None:
        self.epoch += 1
        self.group_size = group_size
        self.routes = [route_of(members, self.epoch) for members in LAYOUTS[group_size]]

    def _shrink(self, route: Route, num_blocks: int) -> None:
        leader = self.scheduler(route.leader)
        plan = leader.plan_shrink(dict.fromkeys(route.worker_ids, num_blocks))
        result = leader.shrink(plan)
        self.workers[route.leader].apply_moves(result.moves)
        self.flush(route.leader)
        for worker_id, num_given_back in result.given_back.items():
            blocks = self.scheduler(worker_id).blocks
            blocks.stage.take_back(num_given_back)
            self.workers[worker_id].apply_moves(blocks.shrink(0, ()))

    def rebalance(self) -> None:
        """Leaders give back what they need no more of workers that the layout took from them."""
        for leader in self.workers:
            scheduler = self.scheduler(leader)
            self.flush(leader)
            for worker_id in self._outsiders(leader):
                strays = [r.route for r in scheduler.requests.values() if r.route is not None]
                is_needed = any(worker_id in route.worker_ids for route in strays)
                num_kept = MIN_KEPT_BLOCKS if is_needed else 0
                num_blocks = scheduler.blocks.give_back(worker_id, num_kept)
                self.scheduler(worker_id).blocks.stage.take_back(num_blocks)
        for route in self.routes:
            for worker_id in route.worker_ids[1:]:
                self._lend(worker_id, route.leader)

    def relocate(self, leader: str, request: Request, home: str) -> bool:
        """Begin to move a request of an old route to the route that `home` leads."""
        target = next(route for route in self.routes if route.leader == home)
        relocation = self.scheduler(leader).relocation
        if home == leader:
            return relocation.move(request, target)
        if request.is_in_flight:
            return False
        relocation.hand_over(request)
        self.flush(leader)
        self.scheduler(home).relocation.adopt(request, target)
        return True

    # --- what must hold --------------------------------------------------------------------------

    def check(self) -> None:
        """No block is lost or has two owners, here or there."""
        for worker_id, worker in self.workers.items():
            worker.scheduler.check_integrity()
            others = [w.scheduler for other, w in self.workers.items() if other != worker_id]
            granted = sum(scheduler.blocks.capacity(worker_id) for scheduler in others)
            assert granted == worker.scheduler.blocks.stage.num_granted_blocks
            for key in worker.scheduler.blocks.stage.keys:
                assert self._is_known(worker_id, key), f"{key} leaks on {worker_id}"

    def _is_known(self, worker_id: str, key: KvKey) -> bool:
        """True if a scheduler answers for the key, or has said that it shall be freed."""
        for other in self.workers.values():
            if any(r.kv_key == key for r in other.scheduler.requests.values()):
                return True
            if key in other.scheduler.blocks.releases.pending().get(worker_id, ()):
                return True
        return False


def _slot(table: list[int], position: int) -> int:
    return table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
