"""Memory of KV that has travelled is used before all KV has.

After a drop under pressure all blocks are full, in the layers given up too, and what was freed may
be less than what wants to come. So whenever no request can travel for lack of room, the layers
given up keep only what still has to travel, and the rest of their memory goes to the layers served:

    layer given up   [ gone | stays | gone | stays ]  --swap-->  [ stays | stays | gone | gone ]
    layer served     [  ..     ..     ..     ..    ]             [  ..      ..  |    mapped    ) <-+
                                                                                       chunks -----+

The leader knows which KV may still be needed; every stage does it for itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.worker.engine.block_manager import BlockOwner, BlockSwap
from services.worker.engine.request import Request
from services.worker.engine.routes import WorkerId
from services.worker.engine.scheduler import Scheduler
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.messages import FrameKind, Retreat
from services.worker.pipeline.peers import GroupPeers

#: Blocks are swapped again when no more than this share of what was left last is still needed.
_SHARE = 0.85


class Retreats:
    """What the leader does about it: orders steps, so that none takes long. One for each drop."""

    def __init__(self, peers: GroupPeers, runner: ModelRunner, scheduler: Scheduler) -> None:
        self._peers = peers
        self._runner = runner
        self._scheduler = scheduler
        self._num_left: dict[WorkerId, int] = {}

    def order(self) -> None:
        """Let those stages retreat, this one too, for which a step is worth it."""
        needed = self._due()
        if not needed:
            return
        keys = {w: tuple(r.kv_key for r in requests) for w, requests in needed.items()}
        self._peers.send_next(FrameKind.RETREAT, Retreat(keys=keys))
        if self._peers.worker_id in needed:
            retreat(self._runner, self._scheduler, needed[self._peers.worker_id])

    def _due(self) -> dict[WorkerId, list[Request]]:
        """By stage, the requests that it keeps KV of; the first step is always worth it."""
        homes = self._scheduler.relocation.homes
        due = {}
        for worker_id in self._peers.route.worker_ids:
            needed = homes.get(worker_id, [])
            num_needed = sum(self._scheduler.blocks.num_held(r, worker_id) for r in needed)
            num_left = self._num_left.get(worker_id)
            if num_left is None or (num_needed < num_left and num_needed <= _SHARE * num_left):
                self._num_left[worker_id] = num_needed
                due[worker_id] = needed
        return due


@torch.inference_mode()
def retreat(runner: ModelRunner, scheduler: Scheduler, needed: Sequence[BlockOwner]) -> None:
    """Leave layers given up only the KV of `needed`; what they do without becomes free blocks.

    No batch may be computing here.
    """
    served = range(runner.span.start, runner.span.end)
    others = (layer for layer in range(runner.config.num_layers) if layer not in runner.span)
    given_up = [layer for layer in others if runner.pool.num_kv_blocks((layer,))]
    num_kept = sum(len(owner.block_table) for owner in needed)
    num_mapped = runner.pool.num_kv_blocks(given_up)
    if num_kept >= num_mapped:
        return
    swaps = scheduler.blocks.bring_forward(needed, scheduler.requests.values())
    # Blocks behind those were taken since, for tokens to come: only layers served have them.
    old = [swap for swap in swaps if swap.high < num_mapped]
    if old:
        high, low = _ids(old, runner.device)
        for layer in given_up:
            cache = runner.kv_cache(layer)
            cache[low] = cache[high]
    if swaps:
        high, low = _ids(swaps, runner.device)
        for layer in served:
            cache = runner.kv_cache(layer)
            cache[low], cache[high] = cache[high], cache[low]
    runner.pool.shrink_kv(given_up, num_kept)
    scheduler.blocks.grow(runner.pool.grow_kv_evenly(served))


def _ids(swaps: Sequence[BlockSwap], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the high blocks, and of the low ones."""
    high, low = (torch.tensor(ids, device=device) for ids in zip(*swaps, strict=True))
    return high, low
