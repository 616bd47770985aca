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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.planner.candidates import SPREAD, Candidate, pipeline
from services.planner.slices import Slicing, StageMember, slice_layers
from shared.layout import GroupPlan
from shared.messages import WorkerInfo

#: A merge shall gain at least this share of the copy it frees, whatever that does to the slowest
#: stage: layers that are even in time (the LM head weighs as much as several) are uneven in memory.
LEAST_GAIN = 0.5
#: Room for what arrives while the drop is carried out.
HEADROOM = 1.1


@dataclass(frozen=True, slots=True)
class DropPlan:
    """A layout with fewer copies.

    Attributes:
        groups: the whole layout, in the order of the leaders.
        num_merges: copies of the model freed; less than asked for where no more can be merged.
        capacity_blocks: what the cluster will have.
        slowest_seconds: of the slowest stage of any new pipeline.
        num_fetched: layers that members would have to get first.
    """

    groups: tuple[GroupPlan, ...]
    num_merges: int
    capacity_blocks: int
    slowest_seconds: float
    num_fetched: int


@dataclass(frozen=True, slots=True)
class _Pool:
    """Candidates that are to be one group."""

    parts: tuple[Candidate, ...]
    num_members: int
    host: str
    demand_blocks: int
    capacity_blocks: int

    @property
    def pressure(self) -> float:
        return self.demand_blocks / self.capacity_blocks if self.capacity_blocks else 0.0


def copies_to_free(lacking_blocks: int, candidates: Sequence[Candidate], num_layers: int) -> int:
    """ceil(R / P), and at least one: the copies whose bytes hold `lacking_blocks`."""
    copies = [_copy_blocks(member, num_layers) for c in candidates[:1] for member in c.members]
    return max(1, math.ceil(lacking_blocks / max(1.0, copies[0]))) if copies else 1


def plan_drop(
    candidates: Sequence[Candidate],
    workers: Mapping[str, WorkerInfo],
    num_layers: int,
    *,
    num_merges: int,
    needed_ratio: float,
    epoch: int,
) -> DropPlan | None:
    """Merge `num_merges` times, or as often as possible.

    Args:
        needed_ratio: blocks needed as a share of what the cluster has as replicas.
        epoch: of the plan that will propose the new groups.

    Returns:
        None where nothing can be merged.
    """
    pools = choose_merges(candidates, num_merges, max_members=num_layers)
    return merge_pools(pools, workers, num_layers, needed_ratio=needed_ratio, epoch=epoch)


def plan_merge(
    merged: Sequence[Candidate],
    others: Sequence[Candidate],
    workers: Mapping[str, WorkerInfo],
    num_layers: int,
    *,
    needed_ratio: float,
    epoch: int,
) -> DropPlan | None:
    """Make one group of `merged` and leave `others` alone; None where that cannot be."""
    pools = [list(merged), *([other] for other in others)]
    return merge_pools(pools, workers, num_layers, needed_ratio=needed_ratio, epoch=epoch)


# --- which groups ---------------------------------------------------------------------------------


def choose_merges(
    candidates: Sequence[Candidate], num_merges: int, max_members: int
) -> list[list[Candidate]]:
    """The greedy: groups of candidates, singletons where nothing happens to them."""
    classes: dict[int, list[_Pool]] = defaultdict(list)
    for candidate in candidates:
        classes[len(candidate.members)].append(_pool(candidate))
    sizes = list(classes)
    heapq.heapify(sizes)
    done: list[_Pool] = []
    left: _Pool | None = None
    while num_merges > 0 and sizes:
        size = heapq.heappop(sizes)
        pools = sorted(classes.pop(size), key=lambda pool: -pool.pressure)
        merged: list[_Pool] = []
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
    return [list(pool.parts) for pool in done]


def _pool(candidate: Candidate) -> _Pool:
    return _Pool(
        (candidate,),
        len(candidate.members),
        candidate.host,
        candidate.demand_blocks,
        candidate.capacity_blocks,
    )


def _merge(first: _Pool, second: _Pool) -> _Pool:
    return _Pool(
        first.parts + second.parts,
        first.num_members + second.num_members,
        first.host if first.host == second.host else SPREAD,
        first.demand_blocks + second.demand_blocks,
        first.capacity_blocks + second.capacity_blocks,
    )


def _partner(pool: _Pool, pools: Sequence[_Pool]) -> int:
    """Index of the best one for a pool that its own class left over; most loaded come first."""
    near = [index for index, other in enumerate(pools) if other.host == pool.host]
    return near[-1] if near else len(pools) - 1


def _pair(pools: Sequence[_Pool], limit: int) -> tuple[list[_Pool], list[_Pool]]:
    """Up to `limit` pairs of pools that come most loaded first, and what remains."""
    by_host: dict[str, deque[int]] = defaultdict(deque)
    for index, pool in enumerate(pools):
        by_host[pool.host].append(index)
    free = [True] * len(pools)
    pairs: list[_Pool] = []
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


def merge_pools(
    pools: Iterable[Sequence[Candidate]],
    workers: Mapping[str, WorkerInfo],
    num_layers: int,
    *,
    needed_ratio: float,
    epoch: int,
) -> DropPlan | None:
    """Give every pool of several candidates its slices; a pool that cannot work stays apart."""
    slicer = _Slicer(num_layers)
    groups: list[GroupPlan] = []
    num_merges, capacity_blocks, num_fetched, slowest = 0, 0, 0, 0.0
    for pool in pools:
        slicing = None
        if len(pool) > 1:
            members = _leader_first(pool)
            slicing = slicer.slice(members, _wanted_blocks(pool, num_layers, needed_ratio))
        if slicing is None:
            groups += [candidate.group for candidate in pool]
            capacity_blocks += sum(candidate.capacity_blocks for candidate in pool)
            continue
        groups.append(pipeline(slicing, members, workers, epoch))
        num_merges += len(pool) - 1
        capacity_blocks += slicing.num_blocks
        num_fetched += slicing.num_fetched
        slowest = max(slowest, slicing.slowest_seconds)
    if num_merges == 0:
        return None
    groups.sort(key=lambda group: group.members[0].worker_id)
    return DropPlan(tuple(groups), num_merges, capacity_blocks, slowest, num_fetched)


class _Slicer:
    """Slices by the shape of the members: in a large cluster most pools look alike."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._known: dict[tuple[object, ...], Slicing | None] = {}

    def slice(self, members: Sequence[StageMember], wanted_blocks: int) -> Slicing | None:
        key = (wanted_blocks, *(member.shape for member in members))
        if key not in self._known:
            self._known[key] = slice_layers(members, self._num_layers, wanted_blocks)
        return self._known[key]


def _leader_first(pool: Sequence[Candidate]) -> list[StageMember]:
    """Members of the most loaded candidate first: of equal ones, the first becomes the leader.

    The leader keeps its requests; the others hand theirs over.
    """
    ordered = sorted(pool, key=lambda candidate: -candidate.demand_blocks)
    return [member for candidate in ordered for member in candidate.members]


def _wanted_blocks(pool: Sequence[Candidate], num_layers: int, needed_ratio: float) -> int:
    """What the merged group shall hold: its share of the need, and a worthwhile gain."""
    copy_blocks = _copy_blocks(pool[0].members[0], num_layers)
    gain = LEAST_GAIN * copy_blocks * (len(pool) - 1)
    has = sum(candidate.capacity_blocks for candidate in pool)
    share = needed_ratio * HEADROOM * sum(candidate.whole_blocks for candidate in pool)
    return math.ceil(max(has + gain, share))


def _copy_blocks(member: StageMember, num_layers: int) -> float:
    """Blocks that fit into the bytes of one copy of the model."""
    costs = member.costs
    return costs.whole_weight_bytes / (num_layers * costs.kv_layer_block_bytes)
