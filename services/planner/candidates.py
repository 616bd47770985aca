"""Groups as drop and restore plans see them: members with their memory, and the load. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from services.planner.pressure import GroupLoad
from services.planner.slices import Slicing
from services.planner.stages import Interval, StageShape
from shared.layout import GroupPlan, MemberPlan, Span
from shared.messages import ModelCosts, WorkerInfo

#: Host of a group whose members are on several.
SPREAD = ""


class Member(NamedTuple):
    """A worker in a group; equal shapes are one object."""

    worker_id: str
    incarnation: str
    shape: StageShape


class Candidate(NamedTuple):
    """A group that may be merged or split.

    Attributes:
        members: in the order of the stages.
        host: of all members; SPREAD where they differ.
        demand_blocks, capacity_blocks: load; 0 demand where nothing is known.
        whole_blocks: capacity of its members as replicas.
        pressure: demand as a share of capacity.
    """

    group: GroupPlan
    members: tuple[Member, ...]
    host: str
    num_members: int
    demand_blocks: int
    capacity_blocks: int
    whole_blocks: int
    pressure: float

    @property
    def parts(self) -> tuple[Candidate, ...]:
        """Itself: what is to become one group may also be several candidates."""
        return (self,)


class Pipeline(NamedTuple):
    """Members that are to serve together by a division of the layers."""

    members: Sequence[Member]
    slicing: Slicing

    def group(self, epoch: int) -> GroupPlan:
        """What the plan says of it; `epoch` is that of the plan which proposes it."""
        stages = [self.members[index] for index in self.slicing.members]
        return GroupPlan(
            group_id=f"p{epoch}-{stages[0].worker_id}",
            members=tuple(
                [
                    MemberPlan(
                        worker_id=member.worker_id, span=span, incarnation=member.incarnation
                    )
                    for member, span in zip(stages, self.slicing.spans, strict=True)
                ]
            ),
            epoch=epoch,
        )


def make_candidates(
    groups: Iterable[GroupPlan],
    workers: Mapping[str, WorkerInfo],
    loads: Mapping[str, GroupLoad],
) -> list[Candidate]:
    """The groups all of whose members live, in their order."""
    shapes = _Shapes()
    candidates = []
    for group in groups:
        members: list[Member] = []
        hosts: set[str] = set()
        whole = 0
        for place in group.members:
            info = workers.get(place.worker_id)
            if info is None:
                break
            shape = shapes.of(info)
            members.append(Member(info.worker_id, info.incarnation, shape))
            hosts.add(info.host)
            whole += shape.whole_blocks
        else:
            load = loads.get(group.group_id)
            demand, capacity = (load.demand_blocks, load.total_blocks) if load else (0, whole)
            candidates.append(
                Candidate(
                    group,
                    tuple(members),
                    hosts.pop() if len(hosts) == 1 else SPREAD,
                    len(members),
                    demand,
                    capacity,
                    whole,
                    demand / capacity if capacity else 0.0,
                )
            )
    return candidates


def total_whole_blocks(groups: Iterable[GroupPlan], workers: Mapping[str, WorkerInfo]) -> int:
    """Capacity of these groups if every member were a replica."""
    shapes = _Shapes()
    return sum(
        shapes.of(info).whole_blocks
        for group in groups
        for member in group.members
        if (info := workers.get(member.worker_id)) is not None
    )


class _Shapes:
    """Shapes of workers, equal ones made one: a large cluster has few."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], StageShape] = {}

    def of(self, info: WorkerInfo) -> StageShape:
        costs = info.costs
        key = (
            info.weight_bytes,
            info.kv_bytes + info.free_bytes,
            info.kv_block_bytes,
            info.num_layers,
            tuple([(span.start, span.end) for span in info.layers]),
            None if costs is None else (_bytes_of(costs), _rounded_seconds(costs)),
        )
        shape = self._known.get(key)
        if shape is None:
            shape = self._known[key] = StageShape(
                memory_bytes=info.weight_bytes + info.kv_bytes + info.free_bytes,
                held=_joined(info.layers),
                costs=_assumed_costs(info) if costs is None else _rounded(costs),
                num_layers=info.num_layers,
            )
        return shape


def _bytes_of(costs: ModelCosts) -> tuple[int, ...]:
    return (
        costs.layer_weight_bytes,
        costs.embedding_weight_bytes,
        costs.head_weight_bytes,
        costs.whole_weight_bytes,
        costs.kv_layer_block_bytes,
        costs.chunk_bytes,
    )


def _rounded_seconds(costs: ModelCosts) -> tuple[float, float, float]:
    """Measured times of layer, embedding and head without their noise.

    A layer is rounded to a step of 10 %, the ends to half a layer: machines of one kind then look
    alike, which is what makes plans of large clusters cheap.
    """
    if costs.layer_seconds <= 0.0:
        return (0.0, 0.0, 0.0)
    layer = 1.1 ** round(math.log(costs.layer_seconds, 1.1))
    half = layer / 2
    return (
        layer,
        half * round(2 * costs.embedding_seconds / costs.layer_seconds),
        half * round(2 * costs.head_seconds / costs.layer_seconds),
    )


def _rounded(costs: ModelCosts) -> ModelCosts:
    layer, embedding, head = _rounded_seconds(costs)
    return costs.model_copy(
        update={"layer_seconds": layer, "embedding_seconds": embedding, "head_seconds": head}
    )


def _assumed_costs(info: WorkerInfo) -> ModelCosts:
    """Of a worker that reports none: all its layers alike, nothing at the ends."""
    num_held = max(1, sum(end - start for start, end in _joined(info.layers)))
    layer_bytes = info.weight_bytes // num_held
    return ModelCosts(
        layer_weight_bytes=layer_bytes,
        embedding_weight_bytes=0,
        head_weight_bytes=0,
        whole_weight_bytes=layer_bytes * info.num_layers,
        kv_layer_block_bytes=max(1, info.kv_block_bytes // num_held),
    )


def _joined(spans: Iterable[Span]) -> tuple[Interval, ...]:
    """Spans as disjoint intervals, those that touch made one."""
    joined: list[Interval] = []
    for span in sorted(spans, key=lambda span: span.start):
        if joined and span.start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], span.end))
        else:
            joined.append((span.start, span.end))
    return tuple(joined)
