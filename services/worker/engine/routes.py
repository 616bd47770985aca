"""The way of a request through workers: which of them computes and keeps which layers.

A route never changes. A drop or a restore makes new ones, and requests move from one to another:

    replica  [w0: 0 ............ 30)            every layer on one worker
    pipeline [w0: 0 ... 15) [w1: 15 ... 30)     stage 0 is the leader, whose scheduler runs it

What must travel when a request moves follows from the two routes alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from shared.layout import GroupPlan

#: Workers are named here as everywhere else: by their worker id.
WorkerId = str


class RouteStage(NamedTuple):
    """One worker and the layers `[start, end)` it computes."""

    worker_id: WorkerId
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Route:
    """The stages of a request, in the order of their layers.

    Attributes:
        route_id: two routes of different epochs have different ids.
        worker_ids: its workers, in order.
    """

    route_id: str
    stages: tuple[RouteStage, ...]
    worker_ids: tuple[WorkerId, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError unless the stages tile the layers and name each worker once."""
        position = 0
        for stage in self.stages:
            if stage.start != position or stage.end <= stage.start:
                raise ValueError(f"route {self.route_id} has no worker for layer {position}")
            position = stage.end
        worker_ids = tuple(stage.worker_id for stage in self.stages)
        if not worker_ids or len(set(worker_ids)) < len(worker_ids):
            raise ValueError(f"route {self.route_id} is empty or names a worker twice")
        object.__setattr__(self, "worker_ids", worker_ids)

    @classmethod
    def of_group(cls, group: GroupPlan, epoch: int) -> Route:
        """The route that a group of the plan of `epoch` serves."""
        stages = (RouteStage(m.worker_id, m.span.start, m.span.end) for m in group.members)
        return cls(f"{group.group_id}@{epoch}", tuple(stages))

    @classmethod
    def of_replica(cls, worker_id: WorkerId, num_layers: int) -> Route:
        """The route of a worker that serves alone."""
        return cls("replica", (RouteStage(worker_id, 0, num_layers),))

    @property
    def leader(self) -> WorkerId:
        """The worker whose scheduler runs it."""
        return self.stages[0].worker_id

    @property
    def num_stages(self) -> int:
        """How many workers, and how many microbatches may be in flight on it."""
        return len(self.stages)


#: The route of an engine that never takes part in a group: one worker, the model as one layer.
REPLICA = Route("replica", (RouteStage("self", 0, 1),))


class Transfer(NamedTuple):
    """The KV of the layers `[start, end)` goes from one worker to another."""

    source: WorkerId
    destination: WorkerId
    start: int
    end: int


def transfers(origin: Route, target: Route) -> tuple[Transfer, ...]:
    """What must travel so that a request whose KV lies along `origin` can go on along `target`.

    Empty if every worker of `target` held its layers before. By destination, then by layer.
    """
    return tuple(transfer for stage in target.stages for transfer in _into(stage, origin))


def _into(stage: RouteStage, origin: Route) -> Iterator[Transfer]:
    for source in origin.stages:
        start, end = max(stage.start, source.start), min(stage.end, source.end)
        if start < end and source.worker_id != stage.worker_id:
            yield Transfer(source.worker_id, stage.worker_id, start, end)
