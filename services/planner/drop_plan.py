"""Which groups become pipelines, so that redundant copies of the model give way to KV. Pure.

The paper's greedy (KunServe §4.1): a pipeline costs more the more stages it has, so the two
smallest groups are merged until enough copies are freed; every merge frees one. Groups of one size
are handled together, which makes ties visible and the whole O(N log N):

    size 1:  a b c d e   --pairs-->  size 2: ab cd      size 1: e is left and joins the next class
    size 2:  ab cd       --e joins--> size 3: abe ...

Among groups of one size the most loaded is merged first, with the least loaded one of the same host
(their link is the fastest there is), else with the least loaded one of all.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from services.planner.candidates import SPREAD, Candidate, Member, Pipeline
from services.planner.slices import Slicing, slice_layers
from shared.layout import GroupPlan

#: A merge shall gain at least this share of the copy it frees, whatever that does to the slowest
#: stage: layers that are even in time (the LM head weighs as much as several) are uneven in memory.
LEAST_GAIN = 0.5
#: Room for what arrives later: under pressure a pipeline is not sliced anew.
HEADROOM = 1.25


@dataclass(frozen=True, slots=True)
class DropPlan:
    """A layout with fewer copies.

    Attributes:
        pipelines: the new groups.
        untouched: the groups that stay as they are.
        num_merges: copies of the model freed; less than asked for where no more can be merged.
        capacity_blocks: what the cluster will have.
        slowest_seconds: of the slowest stage of any new pipeline.
        num_fetched: layers that members would have to get first.
    """

    pipelines: tuple[Pipeline, ...]
    untouched: tuple[GroupPlan, ...]
    num_merges: int
    capacity_blocks: int
    slowest_seconds: float
    num_fetched: int

    def groups(self, epoch: int) -> tuple[GroupPlan, ...]:
        """The whole layout, as the plan of `epoch` proposes it, in the order of the leaders."""
        groups = [*self.untouched, *(pipeline.group(epoch) for pipeline in self.pipelines)]
        groups.sort(key=lambda group: group.members[0].worker_id)
        return tuple(groups)


class Merged(NamedTuple):
    """Candidates that are to be one group: the more loaded first, since its leader will lead."""

    parts: tuple[Candidate, ...]
    num_members: int
    host: str
    demand_blocks: int
    capacity_blocks: int
    whole_blocks: int
    pressure: float


Pool = Candidate | Merged


def copies_to_free(lacking_blocks: int, candidates: Sequence[Candidate]) -> int:
    """ceil(R / P), and at least one: the copies whose bytes hold `lacking_blocks`."""
    if not candidates:
        return 1
    return max(1, math.ceil(lacking_blocks / max(1.0, candidates[0].members[0].shape.copy_blocks)))


def plan_drop(
    candidates: Sequence[Candidate], *, num_merges: int, needed_ratio: float
) -> DropPlan | None:
    """Merge `num_merges` times, or as often as possible.

    Args:
        needed_ratio: blocks needed as a share of what the cluster has as replicas.

    Returns:
        None where nothing can be merged.
    """
    if not candidates:
        return None
    max_members = candidates[0].members[0].shape.num_layers
    return slice_pools(choose_merges(candidates, num_merges, max_members), needed_ratio)


def plan_merge(
    merged: Sequence[Candidate], others: Sequence[Candidate], *, needed_ratio: float
) -> DropPlan | None:
    """Make one group of `merged` and leave `others` alone; None where that cannot be."""
    pool: Pool = merged[0]
    for candidate in merged[1:]:
        pool = _merge(pool, candidate)
    return slice_pools([pool, *others], needed_ratio)


# --- which groups ---------------------------------------------------------------------------------


def choose_merges(candidates: Sequence[Candidate], num_merges: int, max_members: int) -> list[Pool]:
    """The greedy: pools of candidates, of one where nothing happens to it."""
    classes: dict[int, list[Pool]] = defaultdict(list)
    for candidate in candidates:
        classes[candidate.num_members].append(candidate)
    sizes = list(classes)
    heapq.heapify(sizes)
    done: list[Pool] = []
    left: Pool | None = None
    while num_merges > 0 and sizes:
        size = heapq.heappop(sizes)
        pools = sorted(classes.pop(size), key=attrgetter("pressure"), reverse=True)
        merged: list[Merged] = []
        if left is not None and left.num_members + size <= max_members:
            merged.append(_merge(left, pools.pop(_partner(left, pools))))
            num_merges -= 1
            left = None
        if 2 * size <= max_members:
            pairs, pools = _pair(pools, num_merges)
            num_merges -= len(pairs)
            merged += pairs
        for pool in merged:
            if pool.num_members not in classes:
                heapq.heappush(sizes, pool.num_members)
            classes[pool.num_members].append(pool)
        if left is None and len(pools) == 1:
            left = pools.pop()
        done += pools
    done += [left] if left is not None else []
    done += [pool for pools in classes.values() for pool in pools]
    return done


def _merge(first: Pool, second: Pool) -> Merged:
    demand = first.demand_blocks + second.demand_blocks
    capacity = first.capacity_blocks + second.capacity_blocks
    is_first = first.demand_blocks >= second.demand_blocks
    return Merged(
        first.parts + second.parts if is_first else second.parts + first.parts,
        first.num_members + second.num_members,
        first.host if first.host == second.host else SPREAD,
        demand,
        capacity,
        first.whole_blocks + second.whole_blocks,
        demand / capacity if capacity else 0.0,
    )


def _partner(pool: Pool, pools: Sequence[Pool]) -> int:
    """Index of the best one for a pool that its own class left over; most loaded come first."""
    near = [index for index, other in enumerate(pools) if other.host == pool.host]
    return near[-1] if near else len(pools) - 1


def _pair(pools: Sequence[Pool], limit: int) -> tuple[list[Merged], list[Pool]]:
    """Up to `limit` pairs of pools that come most loaded first, and what remains."""
    by_host: dict[str, deque[int]] = defaultdict(deque)
    for index, pool in enumerate(pools):
        by_host[pool.host].append(index)
    free = [True] * len(pools)
    pairs: list[Merged] = []
    strangers: list[int] = []  # no partner on their host
    limit = min(limit, len(pools) // 2)
    for index, pool in enumerate(pools):
        if len(pairs) + len(strangers) >= limit:
            break
        if not free[index]:
            continue
        neighbours = by_host[pool.host]
        neighbours.popleft()  # that is `index`: those before it are taken
        free[index] = False
        if neighbours:
            partner = neighbours.pop()
            free[partner] = False
            pairs.append(_merge(pool, pools[partner]))
        else:
            strangers.append(index)
    rest = deque(strangers + [index for index in range(len(pools)) if free[index]])
    while len(pairs) < limit and len(rest) > 1:
        pairs.append(_merge(pools[rest.popleft()], pools[rest.pop()]))
    return pairs, [pools[index] for index in rest]


# --- with which layers ----------------------------------------------------------------------------


def slice_pools(pools: Iterable[Pool], needed_ratio: float) -> DropPlan | None:
    """Give every pool of several candidates its slices; a pool that cannot work stays apart."""
    slicer = _Slicer()
    pipelines: list[Pipeline] = []
    untouched: list[GroupPlan] = []
    num_merges, capacity_blocks = 0, 0
    for pool in pools:
        if isinstance(pool, Merged):
            members = [member for candidate in pool.parts for member in candidate.members]
            pipeline = slicer.slice(members, _wanted_blocks(pool, needed_ratio))
            if pipeline is not None:
                pipelines.append(pipeline)
                num_merges += len(pool.parts) - 1
                capacity_blocks += pipeline.slicing.num_blocks
                continue
        untouched += [candidate.group for candidate in pool.parts]
        capacity_blocks += pool.capacity_blocks
    if not pipelines:
        return None
    return DropPlan(
        tuple(pipelines),
        tuple(untouched),
        num_merges,
        capacity_blocks,
        max(pipeline.slicing.slowest_seconds for pipeline in pipelines),
        sum(pipeline.slicing.num_fetched for pipeline in pipelines),
    )


class _Slicer:
    """Slices by the shapes of the members: in a large cluster most pools look alike.

    The first member, the most loaded, keeps its place; the others line up by shape, so that pools
    of the same workers in another order count as alike.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], Slicing | None] = {}
        self._numbers: dict[int, int] = {}

    def slice(self, members: Sequence[Member], wanted_blocks: int) -> Pipeline | None:
        """The members as a pipeline, or None where they cannot be one."""
        ordered = [members[0], *sorted(members[1:], key=self._number)]
        key = (wanted_blocks, *[self._number(member) for member in ordered])
        if key not in self._known:
            shapes = [member.shape for member in ordered]
            self._known[key] = slice_layers(shapes, wanted_blocks)
        slicing = self._known[key]
        return Pipeline(ordered, slicing) if slicing is not None else None

    def _number(self, member: Member) -> int:
        """Equal shapes are one object; they are numbered as they come."""
        return self._numbers.setdefault(id(member.shape), len(self._numbers))


def _wanted_blocks(pool: Merged, needed_ratio: float) -> int:
    """What the merged group shall hold: its share of the need, and a worthwhile gain."""
    copies = LEAST_GAIN * (len(pool.parts) - 1)
    gain = copies * pool.parts[0].members[0].shape.copy_blocks
    return math.ceil(max(pool.capacity_blocks + gain, needed_ratio * HEADROOM * pool.whole_blocks))
