"""The routes on which a scheduler has work, each with its pace and its batches in flight.

    lane of the pipeline   batches  7 and 9 in flight   two stages: full
    lane of the replica    batch    8 in flight          one stage: full, but one may be made ahead

Mostly there is one. During a restore requests of two layouts run side by side and take turns.
Batches of one stage return in order, for one may go on with the tokens of the one before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from services.worker.engine.config import SchedulerConfig
from services.worker.engine.cost_model import CostModel
from services.worker.engine.outputs import SchedulerOutput
from services.worker.engine.pacing import PrefillPacer
from services.worker.engine.request_pool import RequestPool
from services.worker.engine.routes import Route, WorkerId


class Lane:
    """One route.

    Attributes:
        pacer: how much a batch takes.
        last_step: its last batch.
        in_flight: batches scheduled and not returned, by step, oldest first.
    """

    def __init__(self, route: Route, pacer: PrefillPacer, num_ahead: int) -> None:
        """Begin with nothing in flight.

        Args:
            num_ahead: batches that may be made beside one for each stage.
        """
        self.route = route
        self.pacer = pacer
        self.last_step = 0
        self.in_flight: dict[int, SchedulerOutput] = {}
        self._capacity = route.num_stages + num_ahead

    @property
    def has_room(self) -> bool:
        """True if another batch may start."""
        return len(self.in_flight) < self._capacity

    @property
    def is_ahead(self) -> bool:
        """True if a batch that started now would find every stage at work."""
        return len(self.in_flight) >= self.route.num_stages

    def returned(self, output: SchedulerOutput) -> None:
        """Take note that a batch is in flight no more; ValueError if it was not, or not yet due."""
        if self.in_flight.get(output.step) is not output:
            raise ValueError(f"batch {output.step} is not in flight")
        if self.route.num_stages == 1 and next(iter(self.in_flight)) != output.step:
            raise ValueError(f"batch {output.step} returns before an older one")
        del self.in_flight[output.step]
        for item in output.scheduled:
            item.request.num_scheduled_tokens -= item.num_scheduled_tokens
            item.request.num_pending_tokens -= item.wants_token


class Lanes:
    """All lanes of a scheduler."""

    def __init__(self, config: SchedulerConfig, cost_model: CostModel) -> None:
        self._config = config
        self._cost_model = cost_model
        self._lanes: dict[Route, Lane] = {}

    @property
    def num_batches_in_flight(self) -> int:
        """Batches of all lanes together."""
        return sum(len(lane.in_flight) for lane in self._lanes.values())

    def by_turn(self, pool: RequestPool) -> Iterator[Lane]:
        """Lanes on which a batch may start, the one whose last batch is oldest first."""
        self._keep(_routes_in_use(pool))
        lanes = sorted(self._lanes.values(), key=lambda lane: lane.last_step)
        return (lane for lane in lanes if lane.has_room)

    def started(self, lane: Lane, output: SchedulerOutput) -> None:
        """Take note of a batch in flight."""
        lane.last_step = output.step
        lane.in_flight[output.step] = output
        for item in output.scheduled:
            item.request.last_step = output.step

    def returned(self, output: SchedulerOutput) -> None:
        """Take note that a batch is in flight no more; ValueError if it was not, or not yet due."""
        lane = self._lanes.get(output.route)
        if lane is None:
            raise ValueError(f"batch {output.step} is not in flight")
        lane.returned(output)

    def lose(self, worker_id: WorkerId | None = None) -> None:
        """Forget the batches that need a worker, or all."""
        for lane in self._lanes.values():
            if worker_id is None or worker_id in lane.route.worker_ids:
                for output in list(lane.in_flight.values()):
                    lane.returned(output)

    def _keep(self, routes: Iterable[Route]) -> None:
        """Open lanes for `routes`; close the others once nothing is in flight on them."""
        lanes = {route: lane for route, lane in self._lanes.items() if lane.in_flight}
        for route in routes:
            lanes[route] = self._lanes.get(route) or self._open(route)
        self._lanes = lanes

    def _open(self, route: Route) -> Lane:
        pacer = PrefillPacer(self._config, self._cost_model, route.num_stages)
        return Lane(route, pacer, 1 if self._config.overlaps and route.num_stages == 1 else 0)


def _routes_in_use(pool: RequestPool) -> set[Route]:
    """The route of new requests, and those of the running ones."""
    routes = {id(request.route): request.route for request in pool.running}  # hashing is slow
    return {pool.route, *(route for route in routes.values() if route is not None)}
