"""Which layers each member of a pipeline serves. Pure; used by drop and restore plans.

A member may serve any contiguous slice that its memory can hold. Where possible each slice lies
inside what its member still holds ("only drop"), so that nothing travels but KV:

    worker a   holds [0 ............... 30)   serves [0 .. 16)
    worker b   holds [0 ............... 30)   serves          [16 .. 30)  and the LM head

Among the possible cuts the slowest stage is as fast as possible, provided that the group holds the
KV blocks it is wanted for; where it cannot hold so many, as many as it can. A block is wanted in
every stage, so the group has as many blocks as its poorest stage.

The set of layers that the first k members can serve together, `[0, p)`, is kept as bit p of an
integer: whether a bound on time and blocks can be met costs a handful of shifts, and binary
searches over both bounds give the optimum for an order of the members.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from services.planner.stages import ROUNDING, Interval, Stage, StageShape, line_up
from shared.layout import Span


@dataclass(frozen=True)
class Slicing:
    """A division of the layers among members.

    Attributes:
        members: indices into the members given, stage after stage.
        cuts: stage k serves `[cuts[k], cuts[k + 1])`.
        slowest_seconds: of the slowest stage; weight bytes stand in where nothing was measured.
        num_blocks: KV blocks of the group: those of its poorest stage.
        num_fetched: layers that members do not hold and would have to get.
    """

    members: tuple[int, ...]
    cuts: tuple[int, ...]
    slowest_seconds: float
    num_blocks: int
    num_fetched: int = 0

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The layers of each stage, as plans name them."""
        return tuple(Span(start=start, end=end) for start, end in pairwise(self.cuts))


def slice_layers(members: Sequence[StageShape], wanted_blocks: int) -> Slicing | None:
    """The best division of the layers among `members`, which may change places.

    Returns None where no division leaves every stage a layer and a block.
    """
    num_layers = members[0].num_layers
    if len(members) > num_layers:
        return None
    orders = _orders(members)
    found = [_only_drop(members, order, num_layers, wanted_blocks) for order in orders]
    if not any(found):
        found = [_with_fetches(members, order, num_layers, wanted_blocks) for order in orders]
    usable = [slicing for slicing in found if slicing is not None]
    return min(usable, key=lambda slicing: _rank(slicing, wanted_blocks), default=None)


def _rank(slicing: Slicing, wanted_blocks: int) -> tuple[int, int, float, int]:
    enough = min(slicing.num_blocks, wanted_blocks)
    return (slicing.num_fetched, -enough, slicing.slowest_seconds, -slicing.num_blocks)


def _orders(members: Sequence[StageShape]) -> list[tuple[int, ...]]:
    """Orders of the members worth trying; the first given stays first among equals."""
    indices = range(len(members))
    first = [member.held[0][0] if member.held else 0 for member in members]
    last = [member.held[-1][1] if member.held else 0 for member in members]
    orders = [
        tuple(sorted(indices, key=lambda i: first[i] + last[i])),
        tuple(sorted(indices, key=lambda i: (first[i], last[i]))),
        tuple(sorted(indices, key=lambda i: (last[i], first[i]))),
    ]
    return list(dict.fromkeys(orders))


# --- one order of the members ---------------------------------------------------------------------


def _only_drop(
    members: Sequence[StageShape], order: tuple[int, ...], num_layers: int, wanted_blocks: int
) -> Slicing | None:
    stages = line_up(members, order)
    num_blocks = _most_blocks(stages, num_layers, wanted_blocks)
    if num_blocks == 0:
        return None
    seconds = _least_seconds(stages, num_layers, num_blocks)
    limits = [stage.max_layers(seconds, num_blocks) for stage in stages]
    cuts = _cuts(stages, limits, num_layers)
    return _slicing(order, stages, cuts)


def _most_blocks(stages: Sequence[Stage], num_layers: int, wanted_blocks: int) -> int:
    """The wanted number of blocks or the most that is possible below it."""

    can_cover = _coverage(stages, num_layers)

    def impossible(num_blocks: int) -> bool:
        return not can_cover([stage.max_layers(math.inf, num_blocks) for stage in stages])

    if not impossible(wanted_blocks):
        return max(1, wanted_blocks)
    each = {stage.num_blocks(n) for stage in stages for n in range(1, num_layers + 1)}
    steps = sorted(blocks for blocks in each if 0 < blocks < wanted_blocks)
    place = bisect_left(steps, True, key=impossible)
    return steps[place - 1] if place else 0


def _least_seconds(stages: Sequence[Stage], num_layers: int, num_blocks: int) -> float:
    """The shortest time of the slowest stage that leaves room for `num_blocks`."""

    can_cover = _coverage(stages, num_layers)

    def possible(seconds: float) -> bool:
        return can_cover([stage.max_layers(seconds, num_blocks) for stage in stages])

    # No division is faster than one of fractions of layers, and few are slower by a layer or more.
    work = num_layers + sum([stage.fixed_seconds / stage.layer_seconds for stage in stages])
    ideal = (1 - ROUNDING) * work / sum([1 / stage.layer_seconds for stage in stages])
    near = ideal + max([stage.layer_seconds for stage in stages])
    times = _times(stages, num_layers, ideal, near)
    if not times or not possible(times[-1]):
        times = _times(stages, num_layers, ideal, math.inf)
    return times[bisect_left(times, True, key=possible)]


def _times(stages: Sequence[Stage], num_layers: int, start: float, end: float) -> list[float]:
    """The times in `[start, end)` that some stage takes for some number of layers, ascending."""
    times = set()
    for stage in stages:
        fewest = max(1, int((start - stage.fixed_seconds) / stage.layer_seconds))
        for layers in range(fewest, num_layers + 1):
            seconds = stage.seconds(layers)
            if seconds >= end:
                break
            if seconds >= start:
                times.add(seconds)
    return sorted(times)


def _coverage(stages: Sequence[Stage], num_layers: int) -> Callable[[Sequence[int]], bool]:
    """Whether stages that serve so many layers at most can serve the whole model together."""
    everything = ((0, num_layers),)
    if all(stage.held == everything for stage in stages):
        return lambda limits: min(limits) > 0 and sum(limits) >= num_layers
    return lambda limits: bool(_reachable(stages, limits)[-1] >> num_layers & 1)


def _reachable(stages: Sequence[Stage], limits: Sequence[int]) -> list[int]:
    """For each k: the set of p such that the first k stages can serve `[0, p)`, as bits."""
    reached = [1]
    for stage, limit in zip(stages, limits, strict=True):
        after = 0
        for start, end in stage.held:
            starts = reached[-1] & _bits(start, end)
            after |= _spread(starts, limit) & _bits(start + 1, end + 1)
        reached.append(after)
    return reached


def _spread(bits: int, limit: int) -> int:
    """Every bit moved up by 1, 2, ... `limit` places."""
    if limit <= 0:
        return 0
    spread, covered = bits << 1, 1
    while covered < limit:
        step = min(covered, limit - covered)
        spread |= spread << step
        covered += step
    return spread


def _bits(start: int, end: int) -> int:
    return (1 << end) - (1 << start)


def _cuts(stages: Sequence[Stage], limits: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Cuts within the limits, from the end, as even as they may be."""
    reached = _reachable(stages, limits)
    cuts = [num_layers]
    for place in range(len(stages) - 1, -1, -1):
        end = cuts[-1]
        held_from = max(start for start, _ in stages[place].held if start < end)
        starts = [
            start
            for start in range(max(held_from, end - limits[place]), end)
            if reached[place] >> start & 1
        ]
        even = end - end / (place + 1)
        cuts.append(min(starts, key=lambda start: abs(start - even)))
    return tuple(reversed(cuts))


def _slicing(order: tuple[int, ...], stages: Sequence[Stage], cuts: tuple[int, ...]) -> Slicing:
    sizes = [end - start for start, end in pairwise(cuts)]
    fetched = sum(
        _missing(stage.held, start, end)
        for stage, (start, end) in zip(stages, pairwise(cuts), strict=True)
    )
    return Slicing(
        members=order,
        cuts=cuts,
        slowest_seconds=max(s.seconds(n) for s, n in zip(stages, sizes, strict=True)),
        num_blocks=min(s.num_blocks(n) for s, n in zip(stages, sizes, strict=True)),
        num_fetched=fetched,
    )


# --- where dropping alone does not do -------------------------------------------------------------


def _with_fetches(
    members: Sequence[StageShape], order: tuple[int, ...], num_layers: int, wanted_blocks: int
) -> Slicing | None:
    """The fewest layers fetched, then the fastest slowest stage."""
    stages = line_up(members, order)
    anywhere = [replace(stage, held=((0, num_layers),)) for stage in stages]
    num_blocks = _most_blocks(anywhere, num_layers, wanted_blocks)
    if num_blocks == 0:
        return None
    # best[p]: (fetched, seconds of the slowest stage, cuts) of the stages so far on [0, p)
    best: dict[int, tuple[int, float, tuple[int, ...]]] = {0: (0, 0.0, (0,))}
    for stage in stages:
        limit = stage.max_layers(math.inf, num_blocks)
        after: dict[int, tuple[int, float, tuple[int, ...]]] = {}
        for start, (fetched, slowest, cuts) in best.items():
            for end in range(start + 1, min(start + limit, num_layers) + 1):
                entry = (
                    fetched + _missing(stage.held, start, end),
                    max(slowest, stage.seconds(end - start)),
                    (*cuts, end),
                )
                if end not in after or entry < after[end]:
                    after[end] = entry
        best = after
    if num_layers not in best:
        return None
    return _slicing(order, stages, best[num_layers][2])


def _missing(held: Sequence[Interval], start: int, end: int) -> int:
    """Layers of `[start, end)` outside `held`."""
    inside = sum(max(0, min(end, b) - max(start, a)) for a, b in held)
    return end - start - inside
