"""Groups as drop and restore plans see them: members with their memory, and the load. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.planner.pressure import GroupLoad
from services.planner.slices import Interval, Slicing, StageMember, whole_blocks
from shared.layout import GroupPlan, MemberPlan, Span
from shared.messages import ModelCosts, WorkerInfo

#: Host of a group whose members are on several.
SPREAD = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A group that may be merged or split.

    Attributes:
        members: in the order of the stages.
        host: of all members; SPREAD where they differ.
        demand_blocks, capacity_blocks: load; 0 demand where nothing is known.
        whole_blocks: capacity of its members as replicas.
    """

    group: GroupPlan
    members: tuple[StageMember, ...]
    host: str
    demand_blocks: int
    capacity_blocks: int
    whole_blocks: int

    @property
    def pressure(self) -> float:
        """Demand as a share of capacity."""
        return self.demand_blocks / self.capacity_blocks if self.capacity_blocks else 0.0


def make_candidates(
    groups: Iterable[GroupPlan],
    workers: Mapping[str, WorkerInfo],
    loads: Mapping[str, GroupLoad],
    num_layers: int,
) -> list[Candidate]:
    """The groups all of whose members live, in their order."""
    return [
        _candidate(group, [workers[m.worker_id] for m in group.members], loads, num_layers)
        for group in groups
        if all(member.worker_id in workers for member in group.members)
    ]


def total_whole_blocks(groups: Iterable[GroupPlan], workers: Mapping[str, WorkerInfo]) -> int:
    """Capacity of these groups if every member were a replica."""
    return sum(
        whole_blocks(stage_member(info), info.num_layers)
        for group in groups
        for member in group.members
        if (info := workers.get(member.worker_id)) is not None
    )


def stage_member(info: WorkerInfo) -> StageMember:
    """What the slicing has to know of a worker."""
    return StageMember(
        worker_id=info.worker_id,
        memory_bytes=info.weight_bytes + info.kv_bytes + info.free_bytes,
        held=_joined(info.layers),
        costs=info.costs or _assumed_costs(info),
    )


def pipeline(
    slicing: Slicing, members: list[StageMember], workers: Mapping[str, WorkerInfo], epoch: int
) -> GroupPlan:
    """The group that serves by this division, first proposed at `epoch`."""
    stages = [members[index].worker_id for index in slicing.members]
    return GroupPlan(
        group_id=f"p{epoch}-{stages[0]}",
        members=tuple(
            MemberPlan(
                worker_id=worker_id,
                span=Span(start=slicing.cuts[k], end=slicing.cuts[k + 1]),
                incarnation=workers[worker_id].incarnation,
            )
            for k, worker_id in enumerate(stages)
        ),
        epoch=epoch,
    )


def _candidate(
    group: GroupPlan,
    infos: list[WorkerInfo],
    loads: Mapping[str, GroupLoad],
    num_layers: int,
) -> Candidate:
    members = tuple(map(stage_member, infos))
    whole = sum(whole_blocks(member, num_layers) for member in members)
    load = loads.get(group.group_id)
    hosts = {info.host for info in infos}
    return Candidate(
        group=group,
        members=members,
        host=hosts.pop() if len(hosts) == 1 else SPREAD,
        demand_blocks=load.demand_blocks if load else 0,
        capacity_blocks=load.total_blocks if load else whole,
        whole_blocks=whole,
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
