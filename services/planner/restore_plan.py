"""Which pipelines become replicas, or at least shorter pipelines, again. Pure.

    [a b c d]  --half-->  [a c] [b d]  --whole-->  [a] [b] [c] [d]

A pipeline is split as far as demand allows: what is left of the capacity, of the group's parts and
of the cluster, must be worth `restore_ratio` of demand. The deepest pipelines come first, since
they cost their requests the most, and among them the least loaded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from services.planner.candidates import Candidate, Member, Pipeline
from services.planner.drop_plan import LEAST_GAIN
from services.planner.layout_policy import replica
from services.planner.slices import slice_layers
from shared.layout import GroupPlan


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """A layout with more copies.

    Attributes:
        groups: the whole layout, in the order of the leaders.
        num_restored: pipelines that were split.
        capacity_blocks: what the cluster will have.
    """

    groups: tuple[GroupPlan, ...]
    num_restored: int
    capacity_blocks: int


@dataclass(frozen=True, slots=True)
class _Split:
    groups: tuple[GroupPlan, ...]
    capacity_blocks: int


def plan_restore(
    candidates: Sequence[Candidate],
    *,
    demand_blocks: int,
    restore_ratio: float,
    epoch: int,
) -> RestorePlan | None:
    """Split what demand allows; None where nothing may be split."""
    capacity = sum(candidate.capacity_blocks for candidate in candidates)
    order = sorted(candidates, key=lambda c: (-len(c.members), c.pressure, c.group.group_id))
    splits: dict[str, _Split] = {}
    for candidate in order:
        for split in _splits(candidate, epoch):
            after = capacity - candidate.capacity_blocks + split.capacity_blocks
            if (
                demand_blocks < restore_ratio * after
                and candidate.demand_blocks < restore_ratio * split.capacity_blocks
            ):
                splits[candidate.group.group_id] = split
                capacity = after
                break
    return _assemble(candidates, splits)


def plan_whole(
    candidates: Sequence[Candidate],
    chosen: Collection[str],
    leaving: Collection[str] = (),
) -> RestorePlan | None:
    """Make replicas of the members of the `chosen` groups, whatever the demand.

    Args:
        leaving: workers that shall not serve any more.
    """
    splits = {
        candidate.group.group_id: _whole(candidate, leaving)
        for candidate in candidates
        if candidate.group.group_id in chosen and len(candidate.members) > 1
    }
    return _assemble(candidates, splits)


def _assemble(candidates: Sequence[Candidate], splits: Mapping[str, _Split]) -> RestorePlan | None:
    if not splits:
        return None
    groups: list[GroupPlan] = []
    capacity = 0
    for candidate in candidates:
        split = splits.get(candidate.group.group_id)
        groups += split.groups if split else (candidate.group,)
        capacity += split.capacity_blocks if split else candidate.capacity_blocks
    groups.sort(key=lambda group: group.members[0].worker_id)
    return RestorePlan(tuple(groups), len(splits), capacity)


def _splits(candidate: Candidate, epoch: int) -> list[_Split]:
    """The ways to split a pipeline, finest first; none for a replica."""
    splits = []
    if len(candidate.members) > 1:
        splits.append(_whole(candidate, leaving=()))
    if len(candidate.members) > 2:
        halved = _halved(candidate, epoch)
        splits += [halved] if halved is not None else []
    return splits


def _whole(candidate: Candidate, leaving: Collection[str]) -> _Split:
    staying = [member for member in candidate.members if member.worker_id not in leaving]
    return _Split(
        tuple(replica(member.worker_id, member.shape.num_layers) for member in staying),
        sum(member.shape.whole_blocks for member in staying),
    )


def _halved(candidate: Candidate, epoch: int) -> _Split | None:
    """Every other stage: each half then holds layers from all over the model."""
    groups: list[GroupPlan] = []
    capacity = 0
    for members in (candidate.members[0::2], candidate.members[1::2]):
        if len(members) == 1:
            groups.append(replica(members[0].worker_id, members[0].shape.num_layers))
            capacity += members[0].shape.whole_blocks
            continue
        slicing = slice_layers([member.shape for member in members], _wanted_blocks(members))
        if slicing is None:
            return None
        groups.append(Pipeline(members, slicing).group(epoch))
        capacity += slicing.num_blocks
    return _Split(tuple(groups), capacity)


def _wanted_blocks(members: Sequence[Member]) -> int:
    """Blocks that a half shall hold: what replicas would, and most of the copies it lacks."""
    whole = sum(member.shape.whole_blocks for member in members)
    gain = LEAST_GAIN * members[0].shape.copy_blocks * (len(members) - 1)
    return whole + math.ceil(gain)
