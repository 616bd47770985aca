"""Plans to be written: contents from whoever decides, versions always above all that is known."""

from __future__ import annotations

from typing import Any

from services.planner.inputs import Inputs
from services.planner.layout_policy import (
    Layout,
    describe_change,
    resting_state,
    settled_layout,
)
from services.planner.rules import Rule
from shared.layout import GroupPlan, LayoutState, Plan, PlanPhase
from shared.messages import AckState


def next_epoch(inputs: Inputs) -> int:
    """An epoch that nobody has seen."""
    previous = inputs.previous
    return max(inputs.applied[1], previous.epoch if previous else 0) + 1


def first_draft(inputs: Inputs, model_id: str, num_layers: int, **fields: Any) -> Plan:
    """A plan where there was none."""
    return Plan(
        term=max(inputs.term, inputs.applied[0]),
        epoch=next_epoch(inputs),
        state=LayoutState.STABLE,
        model_id=model_id,
        num_layers=num_layers,
        created_at=inputs.now,
        **fields,
    )


def draft(inputs: Inputs, previous: Plan, **fields: Any) -> Plan:
    """`previous` with some fields changed, at a new epoch, in its COMMIT phase unless told."""
    values = {
        "phase": PlanPhase.COMMIT,
        "change": None,
        "deadline_at": None,
        "term": max(inputs.term, inputs.applied[0], previous.term),
        "epoch": next_epoch(inputs),
        "created_at": inputs.now,
    }
    return Plan.model_validate({**_fields(previous), **values, **fields})


def redraft(inputs: Inputs, previous: Plan) -> Plan:
    """The same plan once more, since it got lost or a new leader took over.

    It keeps its epoch where a higher term already makes it the newest. What waits for answers gets
    its time again.
    """
    applied_term, applied_epoch = inputs.applied
    term = max(inputs.term, applied_term, previous.term)
    epoch = max(previous.epoch, applied_epoch)
    if not (epoch == previous.epoch and term > previous.term and term > applied_term):
        epoch += 1
    deadline = previous.deadline_at
    if deadline is not None and previous.phase is PlanPhase.PREPARE:
        deadline = inputs.timing.prepare_deadline(previous.state, inputs.now)
    elif deadline is not None:
        deadline = inputs.now + inputs.timing.commit_seconds
    return previous.model_copy(update={"term": term, "epoch": epoch, "deadline_at": deadline})


def _fields(plan: Plan) -> dict[str, Any]:
    """The fields of a plan, its parts as they are."""
    return {name: getattr(plan, name) for name in Plan.model_fields}


def draft_layout(inputs: Inputs, previous: Plan, layout: Layout, **fields: Any) -> Plan:
    """The plan in which `layout` is at rest, unless `fields` say otherwise."""
    values = {
        "state": resting_state(layout.groups),
        "model_id": layout.model_id,
        "num_layers": layout.num_layers,
        "groups": layout.groups,
        "reason": describe_change(previous, layout),
    }
    return draft(inputs, previous, **{**values, **fields})


def layout_now(
    inputs: Inputs,
    previous: Plan,
    groups: tuple[GroupPlan, ...],
    broken: frozenset[str],
    *,
    absence_counts: bool = True,
) -> Layout:
    """`groups` as far as they still can serve, and the replicas there are besides."""
    layout = settled_layout(inputs.workers, previous, groups, broken, absence_counts=absence_counts)
    if layout is None:  # no worker is left: the model is still that of the plan
        return Layout(previous.model_id, previous.num_layers, (), {})
    return layout


def failed_groups(inputs: Inputs, groups: tuple[GroupPlan, ...]) -> frozenset[str]:
    """Pipelines that a member says it cannot serve any more."""
    return frozenset(
        group.group_id
        for group in groups
        if len(group.members) > 1
        for member in group.members
        if (ack := inputs.acks.get(member.worker_id)) is not None
        and ack.state is AckState.FAILED
        and ack.epoch >= group.epoch
    )


def why_rewrite(inputs: Inputs, previous: Plan) -> Rule | None:
    """Why the same plan must be written again, if so."""
    if inputs.stored is None or inputs.stored.version < previous.version:
        return Rule.STORE_LOST
    if inputs.stored.version < inputs.applied:
        return Rule.BEHIND_WORKERS
    if inputs.stored.term < inputs.term:
        return Rule.NEW_TERM
    return None
