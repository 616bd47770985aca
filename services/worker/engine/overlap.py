"""Batches that are made while the batch before them is still being computed. Pure.

A device that computes by itself must not wait for the host between two batches. So on a route of
one stage there may be a second batch, made and launched before the first one has returned:

    host    | make 1 | make 2 |  take in 1, make 3  |  take in 2, make 4  | ...
    device           |    batch 1    |    batch 2    |    batch 3    | ...

Batch 2 is made without knowing the tokens of batch 1. It may contain a request of batch 1: with the
next chunk of its prompt, or with the token that batch 1 samples, which batch 2 finds on the device.
All that must be known of that token is that it is not the last one. So a request that reaches its
length with batch 1 is left out; of one that meets a stop token in batch 1, what batch 2 computes is
dropped. Penalties count the token on the device, too.

Nobody gives way to a batch that is made ahead: who is in flight cannot be preempted, and the choice
among the others would be unfair. Where somebody whose turn it is lacks a block, nothing is made
ahead at all, so batch 1 returns and the next batch is made as if there were no overlap.

Progress. Therefore everything that `batch_builder.py` says of progress holds here. The oldest
running request is in a batch, or joins the next one: it finds its block among the free ones, or
else nothing is made until nothing is in flight, and then it may take the block of a younger one.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.worker.engine.group_blocks import GroupBlocks
from services.worker.engine.request import Request
from services.worker.engine.routes import Route
from services.worker.engine.stopping import reaches_limit


def may_follow(request: Request, max_model_len: int) -> bool:
    """True if a running request has tokens for a batch behind those in flight."""
    return not reaches_limit(request, request.num_expected_tokens, max_model_len)


def have_room(requests: Iterable[Request], blocks: GroupBlocks, route: Route) -> bool:
    """True if blocks for the next tokens of all `requests` are free; `route` has one stage."""
    worker_id = route.leader
    num_missing = sum(
        max(0, blocks.blocks_for(request.num_expected_tokens) - blocks.num_held(request, worker_id))
        for request in requests
    )
    return num_missing <= blocks.num_free(worker_id)
