"""A plan as `/admin/drop` and `/admin/restore` answer with it; groups look as in `/cluster`."""

from __future__ import annotations

from typing import Any

from shared.layout import GroupPlan, Plan


def plan_view(plan: Plan) -> dict[str, Any]:
    """The layout that a plan leads to."""
    return {
        "epoch": plan.epoch,
        "term": plan.term,
        "state": plan.state.value,
        "phase": plan.phase.value,
        "dry_run": plan.dry_run,
        "reason": plan.reason,
        "hold": plan.hold.model_dump(mode="json") if plan.hold is not None else None,
        "groups": [_group(group) for group in plan.groups],
    }


def _group(group: GroupPlan) -> dict[str, Any]:
    return {
        "id": group.group_id,
        "leader": group.leader,
        "members": [
            {"worker": member.worker_id, "layers": [member.span.start, member.span.end]}
            for member in group.members
        ],
    }
