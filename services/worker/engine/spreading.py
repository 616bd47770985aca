"""Which of several leaders takes which queued requests when a pipeline is split. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from services.worker.engine.request import Request
from services.worker.engine.routes import WorkerId


def spread(
    requests: Sequence[Request],
    used_blocks: Mapping[WorkerId, int],
    num_members: Mapping[WorkerId, int],
    blocks_for: Callable[[int], int],
) -> dict[WorkerId, list[Request]]:
    """Give each request to the leader whose members have the least to hold, in order of arrival.

    Args:
        requests: without KV.
        used_blocks: what each leader's requests hold already; its keys are the leaders.
        num_members: of each leader's group.
        blocks_for: blocks that so many tokens take.
    """
    wanted = dict(used_blocks)
    shares: dict[WorkerId, list[Request]] = {leader: [] for leader in used_blocks}
    for request in sorted(requests, key=lambda request: request.arrival_seconds):
        num_blocks = blocks_for(request.num_tokens)
        leader = min(wanted, key=lambda each: (wanted[each] + num_blocks) / num_members[each])
        wanted[leader] += num_blocks
        shares[leader].append(request)
    return shares
