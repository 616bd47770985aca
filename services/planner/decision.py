"""What the leading planner does next: keep, hold or publish. Pure.

Every decision names the rule it follows and carries its inputs, for the log and for metrics.

    a transition under way?  -- yes -->  next phase, fall back, break up, or wait
        no: workers changed? store behind?  -->  the same layout, or with the workers there are
        no: an operator's wish?  -->  `orders`
        no: load                 -->  `steering`
"""

from __future__ import annotations

from collections.abc import Mapping

from services.planner.drafts import (
    draft,
    draft_layout,
    failed_groups,
    first_draft,
    layout_now,
    redraft,
    why_rewrite,
)
from services.planner.inputs import Inputs
from services.planner.layout_policy import (
    Layout,
    WorkerVerdict,
    describe_change,
    settled_layout,
)
from services.planner.orders import OrderError, carry_out
from services.planner.rules import Action, Decision, Restraint, Rule, Target
from services.planner.steering import steer
from services.planner.underway import Underway
from shared.layout import Change, Plan, PlanPhase
from shared.messages import AdminReply, AdminRequest


def decide(inputs: Inputs) -> Decision:
    """Choose the next plan.

    The result's version is above everything known: the stored plan, the remembered one and what
    workers applied, so that it is taken by all even after the store was lost.
    """
    previous = inputs.previous
    if previous is None:
        return _first(inputs)
    if previous.change is None:
        return _at_rest(inputs, previous)
    return Underway(inputs, previous, previous.change).decide()


# --- at rest --------------------------------------------------------------------------------------


def _first(inputs: Inputs) -> Decision:
    layout = settled_layout(inputs.workers, None)
    reply = AdminReply(error="there is no plan yet") if inputs.wish else None
    if layout is None:
        return Decision(Action.HOLD, Rule.NO_WORKER_YET, reply=reply)
    if inputs.membership_held or not layout.groups:
        rule = Rule.MEMBERSHIP_UNCERTAIN if inputs.membership_held else Rule.NO_WORKER_YET
        return Decision(Action.HOLD, rule, verdicts=layout.verdicts, reply=reply)
    plan = first_draft(
        inputs,
        layout.model_id,
        layout.num_layers,
        groups=layout.groups,
        reason=describe_change(None, layout),
    )
    return Decision(
        Action.PUBLISH, Rule.FIRST_PLAN, plan, True, layout.verdicts, plan.reason, reply=reply
    )


def _at_rest(inputs: Inputs, previous: Plan) -> Decision:
    failed = failed_groups(inputs, previous.groups)
    is_held = inputs.membership_held
    layout = layout_now(inputs, previous, previous.groups, failed, absence_counts=not is_held)
    verdicts = layout.verdicts
    if _differs(layout, previous):
        plan = draft_layout(inputs, previous, layout)
        return Decision(Action.PUBLISH, Rule.WORKERS_CHANGED, plan, True, verdicts, plan.reason)
    if (rewrite := why_rewrite(inputs, previous)) is not None:
        return Decision(Action.PUBLISH, rewrite, redraft(inputs, previous), verdicts=verdicts)
    if is_held and _differs(layout_now(inputs, previous, previous.groups, failed), previous):
        unsure = AdminReply(error="it is not certain which workers live: try again in a moment")
        reply = unsure if inputs.wish else None
        return Decision(Action.HOLD, Rule.MEMBERSHIP_UNCERTAIN, verdicts=verdicts, reply=reply)
    if inputs.wish is not None:
        return _grant(inputs.wish, inputs, previous, verdicts)
    match steer(inputs, previous):
        case Target() as target:
            plan = _prepare(inputs, previous, target)
            return Decision(
                Action.PUBLISH, target.rule, plan, verdicts=verdicts, detail=target.cause
            )
        case Restraint(rule, detail):
            return Decision(Action.HOLD, rule, verdicts=verdicts, detail=detail)
        case None:
            return Decision(Action.KEEP, Rule.UNCHANGED, verdicts=verdicts)


def _differs(layout: Layout, plan: Plan) -> bool:
    return layout.groups != plan.groups or layout.model_id != plan.model_id


def _grant(
    wish: AdminRequest,
    inputs: Inputs,
    previous: Plan,
    verdicts: Mapping[str, WorkerVerdict],
) -> Decision:
    try:
        target = carry_out(wish, inputs, previous)
    except OrderError as error:
        reply = AdminReply(error=str(error))
        return Decision(Action.KEEP, Rule.ORDERED, None, False, verdicts, str(error), reply=reply)
    plan = _prepare(inputs, previous, target).model_copy(update={"dry_run": wish.dry_run})
    reply = AdminReply(detail=target.cause, plan=plan)
    if wish.dry_run:
        detail = f"only shown: {target.cause}"
        return Decision(Action.KEEP, Rule.ORDERED, None, False, verdicts, detail, reply=reply)
    return Decision(Action.PUBLISH, Rule.ORDERED, plan, False, verdicts, target.cause, reply=reply)


def _prepare(inputs: Inputs, previous: Plan, target: Target) -> Plan:
    return draft(
        inputs,
        previous,
        state=target.state,
        phase=PlanPhase.PREPARE,
        groups=target.groups,
        reason=target.cause,
        deadline_at=inputs.timing.prepare_deadline(target.state, inputs.now),
        change=Change(
            cause=target.cause,
            started_at=inputs.now,
            previous_groups=previous.groups,
            previous_hold=previous.hold,
        ),
        hold=target.hold,
    )
