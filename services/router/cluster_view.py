"""`GET /cluster`: the layout, the load of each group, the workers and the past transitions.

A pure function of what the router has heard. The shape is part of the public contract.
"""

from __future__ import annotations

from typing import Any

from services.router.fleet import Fleet
from shared.layout import GroupPlan, LayoutState, Span, Transition
from shared.messages import WorkerInfo

NUM_TRANSITIONS = 20


def cluster_view(fleet: Fleet) -> dict[str, Any]:
    """The answer to `GET /cluster`; before the first plan it shows epoch 0 and no groups."""
    plan = fleet.plan
    return {
        "epoch": plan.epoch if plan else 0,
        "term": plan.term if plan else 0,
        "state": plan.state.value if plan else LayoutState.STABLE.value,
        "groups": [_group(fleet, group) for group in (plan.serving_groups if plan else ())],
        "workers": [_worker(fleet.workers[worker_id]) for worker_id in sorted(fleet.workers)],
        "transitions": [
            _transition(transition)
            for transition in fleet.transitions.transitions[-NUM_TRANSITIONS:]
        ],
    }


def _group(fleet: Fleet, group: GroupPlan) -> dict[str, Any]:
    load = fleet.loads.get(group.leader)
    report = load.report if load else None
    return {
        "id": group.group_id,
        "leader": group.leader,
        "members": [
            {"worker": member.worker_id, "layers": _layers(member.span)} for member in group.members
        ],
        "requests_running": report.requests_running if report else 0,
        "requests_waiting": report.requests_waiting if report else 0,
        "kv_blocks_used": report.kv_blocks_used if report else 0,
        "kv_blocks_total": report.kv_blocks_total if report else 0,
    }


def _worker(info: WorkerInfo) -> dict[str, Any]:
    return {
        "id": info.worker_id,
        "layers": [_layers(span) for span in info.layers],
        "device": info.device,
        "memory_bytes": info.memory_bytes,
        "weight_bytes": info.weight_bytes,
        "kv_bytes": info.kv_bytes,
        "free_bytes": info.free_bytes,
        "state": info.state.value,
    }


def _transition(transition: Transition) -> dict[str, Any]:
    return transition.model_dump(mode="json")


def _layers(span: Span) -> list[int]:
    return [span.start, span.end]
