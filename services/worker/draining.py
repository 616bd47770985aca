"""When a worker that drains may leave. Pure.

A follower is needed until its group is restored, whoever else drains: the leader sends it batches.
A leader that has finished its requests waits for that too, unless all the others leave as well:
then nobody is left to serve, and its going tells them.
"""

from __future__ import annotations

from collections.abc import Mapping

from shared.layout import GroupPlan
from shared.messages import WorkerInfo, WorkerState


def why_stay(
    worker_id: str,
    num_open_streams: int,
    group: GroupPlan | None,
    workers: Mapping[str, WorkerInfo],
) -> str:
    """What a draining worker must stay for; empty if it may leave.

    Args:
        group: the pipeline whose members need its layers; None where there is none.
        workers: living workers by id.
    """
    if num_open_streams:
        return f"{num_open_streams} requests run"
    if group is None:
        return ""
    others = [m.worker_id for m in group.members if m.worker_id != worker_id]
    is_last = all(w not in workers or workers[w].state is WorkerState.DRAINING for w in others)
    if worker_id == group.leader and is_last:
        return ""
    return f"group {group.group_id} needs its layers"
