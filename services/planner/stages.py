"""What a worker is to the planner's arithmetic: memory, layers held, times. Pure.

`StageShape` is a worker anywhere, `Stage` the same worker in its place in a pipeline: the first
stage has the embedding to pay for, the last one the LM head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from shared.messages import ModelCosts

Interval = tuple[int, int]

#: Stage times are compared with this tolerance: they are sums of floats.
ROUNDING = 1e-9


@dataclass(frozen=True)
class StageShape:
    """What the slicing has to know of a worker; workers of equal shape are interchangeable.

    Attributes:
        memory_bytes: for weights and KV together.
        held: layers whose weights are resident, half-open, disjoint, ascending, not touching.
    """

    memory_bytes: int
    held: tuple[Interval, ...]
    costs: ModelCosts
    num_layers: int

    @cached_property
    def whole_blocks(self) -> int:
        """KV blocks that the worker has as a replica."""
        free_bytes = self.memory_bytes - self.costs.whole_weight_bytes
        return max(0, _blocks_in(free_bytes // self.num_layers, self.costs))

    @cached_property
    def copy_blocks(self) -> float:
        """KV blocks that fit into the bytes of one copy of the model: the paper's P."""
        costs = self.costs
        return costs.whole_weight_bytes / (self.num_layers * costs.kv_layer_block_bytes)


@dataclass(frozen=True, slots=True)
class Stage:
    """One member in its place: what is not layers is paid already."""

    memory_bytes: int
    fixed_seconds: float
    held: tuple[Interval, ...]
    costs: ModelCosts
    layer_seconds: float

    def max_layers(self, seconds: float, num_blocks: int) -> int:
        """Layers it can hold beside `num_blocks` blocks and compute in `seconds`."""
        chunk_bytes, kv_bytes = self.costs.chunk_bytes, self.costs.kv_layer_block_bytes
        kv_bytes = -(-num_blocks * kv_bytes // chunk_bytes) * chunk_bytes
        by_memory = self.memory_bytes // (self.costs.layer_weight_bytes + kv_bytes)
        if math.isinf(seconds):
            return max(0, by_memory)
        by_time = int((seconds - self.fixed_seconds) / self.layer_seconds + ROUNDING)
        return max(0, min(by_memory, by_time))

    def seconds(self, layers: int) -> float:
        """What it takes with so many layers."""
        return self.fixed_seconds + layers * self.layer_seconds

    def num_blocks(self, layers: int) -> int:
        """KV blocks that fit beside so many layers."""
        return _blocks_in(self.memory_bytes // layers - self.costs.layer_weight_bytes, self.costs)


def _blocks_in(layer_bytes: int, costs: ModelCosts) -> int:
    """KV blocks of one layer that fit into the whole chunks of `layer_bytes`."""
    return layer_bytes // costs.chunk_bytes * costs.chunk_bytes // costs.kv_layer_block_bytes


def line_up(members: Sequence[StageShape], order: Sequence[int]) -> list[Stage]:
    """The members as stages in this order."""
    stages = []
    for place, index in enumerate(order):
        costs = members[index].costs
        measured = costs.layer_seconds > 0.0
        fixed_bytes, fixed_seconds = 0, 0.0
        if place == 0:
            fixed_bytes += costs.embedding_weight_bytes
            fixed_seconds += costs.embedding_seconds if measured else 0.0  # a lookup
        if place == len(order) - 1:
            fixed_bytes += costs.head_weight_bytes
            fixed_seconds += costs.head_seconds if measured else float(costs.head_weight_bytes)
        stages.append(
            Stage(
                memory_bytes=members[index].memory_bytes - fixed_bytes,
                fixed_seconds=fixed_seconds,
                held=members[index].held,
                costs=costs,
                layer_seconds=(
                    costs.layer_seconds if measured else float(max(1, costs.layer_weight_bytes))
                ),
            )
        )
    return stages
