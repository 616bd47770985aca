"""Making a pool smaller, as a restore needs it: who must give way, and which blocks move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from services.worker.engine.block_manager import BlockMove
from services.worker.engine.request import Request, RequestStatus
from services.worker.engine.request_pool import RequestPool
from services.worker.engine.routes import WorkerId
from shared.errors import KunserveError


class ShrinkError(KunserveError):
    """A pool cannot be made that small, or not now."""


@dataclass(frozen=True, slots=True)
class ShrinkPlan:
    """What happens to make the pools as small as `targets` says.

    Attributes:
        targets: blocks that remain, by worker.
        preempted: requests that lose their KV for it, on every stage.
    """

    targets: Mapping[WorkerId, int]
    preempted: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class ShrinkResult:
    """What remains to be done.

    Attributes:
        moves: copies that this worker makes before it unmaps what lies behind its last block.
        given_back: blocks that each other worker is to be told of (`StageBlocks.take_back`),
            behind the keys released so far.
    """

    moves: tuple[BlockMove, ...]
    given_back: Mapping[WorkerId, int]


def plan_shrink(
    pool: RequestPool, targets: Mapping[WorkerId, int], max_model_len: int
) -> ShrinkPlan:
    """Choose who must be preempted so that `targets` blocks suffice: the youngest, as few as do.

    Args:
        targets: blocks that this scheduler's requests may use from then on, by worker.

    Raises:
        ShrinkError: less than one request of `max_model_len` needs, or more than there is.
    """
    blocks = pool.blocks
    for worker_id, num_blocks in targets.items():
        if not blocks.blocks_for(max_model_len) <= num_blocks <= blocks.capacity(worker_id):
            raise ShrinkError(
                f"cannot shrink {worker_id} from {blocks.capacity(worker_id)} blocks to"
                f" {num_blocks}; one request of {max_model_len} tokens needs"
                f" {blocks.blocks_for(max_model_len)}"
            )
    surplus = {w: blocks.num_used(w) - num_blocks for w, num_blocks in targets.items()}
    preempted = []
    for request in _youngest_first(pool):
        short = [worker_id for worker_id, num_blocks in surplus.items() if num_blocks > 0]
        if not any(blocks.holds(request, worker_id) for worker_id in short):
            continue
        preempted.append(request)
        for worker_id in surplus:
            surplus[worker_id] -= blocks.num_held(request, worker_id)
    return ShrinkPlan(dict(targets), tuple(preempted))


def apply_shrink(pool: RequestPool, plan: ShrinkPlan, worker_id: WorkerId) -> ShrinkResult:
    """Preempt and shrink; no batch may be in flight, and nothing may have changed since the plan.

    Args:
        worker_id: this worker.

    Raises:
        ShrinkError: something has changed.
    """
    for request in plan.preempted:
        pool.preempt(request)
    for member, num_blocks in plan.targets.items():
        if pool.blocks.num_used(member) > num_blocks:
            raise ShrinkError(f"the plan to shrink {member} to {num_blocks} blocks is out of date")
    moves: list[BlockMove] = []
    given_back = {}
    for member, num_blocks in plan.targets.items():
        if member == worker_id:
            moves = pool.blocks.shrink(num_blocks, pool.requests.values())
        else:
            given_back[member] = pool.blocks.give_back(member, num_blocks)
    return ShrinkResult(tuple(moves), given_back)


def _youngest_first(pool: RequestPool) -> Iterator[Request]:
    holders = [
        request
        for request in pool.requests.values()
        if request.status in (RequestStatus.RUNNING, RequestStatus.PARKED, RequestStatus.EXCHANGING)
    ]
    return iter(sorted(holders, key=lambda request: request.arrival_seconds, reverse=True))
