"""What the leading planner does next: keep, hold or publish. Pure.

Every decision names the rule it follows and carries its inputs, for the log and for metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from services.planner.layout_policy import Layout, WorkerVerdict, describe_change, stable_layout
from shared.layout import LayoutState, Plan
from shared.messages import WorkerInfo


class Action(StrEnum):
    """What to do with the plan."""

    KEEP = "keep"
    HOLD = "hold"
    PUBLISH = "publish"


class Rule(StrEnum):
    """Why."""

    UNCHANGED = "unchanged"
    NO_WORKER_YET = "no_worker_yet"
    MEMBERSHIP_UNCERTAIN = "membership_uncertain"
    FIRST_PLAN = "first_plan"
    WORKERS_CHANGED = "workers_changed"
    NEW_TERM = "new_term"
    STORE_LOST = "store_lost"
    BEHIND_WORKERS = "behind_workers"


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that a decision depends on.

    Attributes:
        stored: the plan in the store now; None where there is none (any more).
        remembered: the newest plan this planner has seen or written.
        applied: the highest term and the highest epoch that any worker says it applied.
        membership_held: absence of a worker proves nothing at the moment.
        stale_loads: serving workers whose load is not known; the layout is never changed for
            their sake.
        now: wall clock, seconds.
    """

    term: int
    workers: Mapping[str, WorkerInfo]
    stored: Plan | None = None
    remembered: Plan | None = None
    applied: tuple[int, int] = (0, 0)
    membership_held: bool = False
    stale_loads: frozenset[str] = frozenset()
    now: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision; `plan` is what to write where the action is PUBLISH."""

    action: Action
    rule: Rule
    plan: Plan | None = None
    layout_changed: bool = False
    verdicts: Mapping[str, WorkerVerdict] = field(default_factory=dict)


def decide(inputs: Inputs) -> Decision:
    """Choose the next plan.

    The result's version is above everything known: the stored plan, the remembered one and what
    workers applied, so that it is taken by all even after the store was lost.
    """
    previous = _newest(inputs.stored, inputs.remembered)
    layout = stable_layout(inputs.workers, previous)
    if layout is None:
        return Decision(Action.HOLD, Rule.NO_WORKER_YET)
    if previous is None:
        if inputs.membership_held:
            return Decision(Action.HOLD, Rule.MEMBERSHIP_UNCERTAIN, verdicts=layout.verdicts)
        if not layout.groups:
            return Decision(Action.HOLD, Rule.NO_WORKER_YET, verdicts=layout.verdicts)
        return _publish(inputs, Rule.FIRST_PLAN, layout, None, layout_changed=True)

    changed = layout.groups != previous.groups or layout.model_id != previous.model_id
    if changed and not inputs.membership_held:
        return _publish(inputs, Rule.WORKERS_CHANGED, layout, previous, layout_changed=True)
    if (rewrite := _why_rewrite(inputs, previous)) is not None:
        same = Layout(previous.model_id, previous.num_layers, previous.groups, layout.verdicts)
        return _publish(inputs, rewrite, same, previous, layout_changed=False)
    if changed:
        return Decision(Action.HOLD, Rule.MEMBERSHIP_UNCERTAIN, verdicts=layout.verdicts)
    return Decision(Action.KEEP, Rule.UNCHANGED, verdicts=layout.verdicts)


def _why_rewrite(inputs: Inputs, previous: Plan) -> Rule | None:
    """Why the same layout must be written again, if so."""
    if inputs.stored is None or inputs.stored.version < previous.version:
        return Rule.STORE_LOST
    if inputs.stored.version < inputs.applied:
        return Rule.BEHIND_WORKERS
    if inputs.stored.term < inputs.term:
        return Rule.NEW_TERM
    return None


def _publish(
    inputs: Inputs, rule: Rule, layout: Layout, previous: Plan | None, *, layout_changed: bool
) -> Decision:
    applied_term, applied_epoch = inputs.applied
    term = max(inputs.term, applied_term)
    epoch = applied_epoch
    if previous is not None:
        term, epoch = max(term, previous.term), max(epoch, previous.epoch)
    # The same layout keeps its epoch where a higher term already makes it the newest.
    is_newest = previous is not None and epoch == previous.epoch and term > previous.term
    if layout_changed or not is_newest or term <= applied_term:
        epoch += 1
    reason = describe_change(previous, layout) if layout_changed else rule.value
    plan = Plan(
        term=term,
        epoch=epoch,
        state=LayoutState.STABLE,
        model_id=layout.model_id,
        num_layers=layout.num_layers,
        groups=layout.groups,
        reason=reason,
        created_at=inputs.now,
    )
    return Decision(Action.PUBLISH, rule, plan, layout_changed, layout.verdicts)


def _newest(stored: Plan | None, remembered: Plan | None) -> Plan | None:
    known = [plan for plan in (stored, remembered) if plan is not None]
    return max(known, key=lambda plan: plan.version, default=None)
