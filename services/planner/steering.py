"""Dropping and restoring of the planner's own accord, while the layout is at rest. Pure.

Drop: demand at 95 % of capacity and a queue that does not fit, or a forecast of it. Restore:
demand has stayed below half of what would be left, and does not rise. Between two transitions lies
a dwell time, which only memory that is short now may cut short. An unknown load decides nothing.
"""

from __future__ import annotations

from services.planner.candidates import make_candidates
from services.planner.drafts import next_epoch
from services.planner.drop_plan import DropPlan, copies_to_free, plan_drop
from services.planner.inputs import Inputs
from services.planner.pressure import Overload, Pressure
from services.planner.restore_plan import plan_restore, plan_whole
from services.planner.rules import Restraint, Rule, Target
from shared.layout import Hold, HoldKind, LayoutState, Plan
from shared.messages import WorkerState


def steer(inputs: Inputs, plan: Plan) -> Target | Restraint | None:
    """What the load calls for; None: nothing."""
    if (relief := _release_draining(inputs, plan)) is not None:
        return relief
    pressure = inputs.pressure
    if pressure is None:
        return None
    is_dropped = any(len(group.members) > 1 for group in plan.groups)
    if pressure.unknown:
        if not is_dropped and not inputs.may_drop:
            return None
        unknown = ", ".join(sorted(pressure.unknown))
        return Restraint(Rule.LOADS_UNKNOWN, f"no fresh load report from {unknown}")
    overload = pressure.overload(inputs.thresholds)
    if overload is not None:
        return _drop(inputs, plan, pressure, overload) if inputs.may_drop else None
    return _restore(inputs, plan, pressure) if is_dropped else None


def needed_ratio(inputs: Inputs) -> float:
    """Blocks needed now or soon, as a share of what replicas would have."""
    pressure = inputs.pressure
    if pressure is None or pressure.whole_blocks == 0:
        return 1.0
    return max(pressure.demand_blocks, pressure.forecast_blocks) / pressure.whole_blocks


def describe_drop(dropped: DropPlan, capacity_blocks: int) -> str:
    """What a drop leads to, for people."""
    copies = "copy" if dropped.num_merges == 1 else "copies"
    fetched = f", {dropped.num_fetched} layers to be fetched" if dropped.num_fetched else ""
    return (
        f"{dropped.num_merges} {copies} of the model freed,"
        f" KV blocks {capacity_blocks} -> {dropped.capacity_blocks}{fetched}"
    )


def active_hold(plan: Plan, now: float) -> Hold | None:
    """The operator's hold, unless it has run out."""
    hold = plan.hold
    return hold if hold is not None and hold.forbids(hold.kind, now) else None


def _drop(inputs: Inputs, plan: Plan, pressure: Pressure, overload: Overload) -> Target | Restraint:
    why = (
        f"demand {pressure.demand_blocks} of {pressure.capacity_blocks} blocks"
        f" ({pressure.ratio:.0%})"
    )
    if overload is Overload.FORECAST:
        why += (
            f", {pressure.forecast_blocks:.0f} expected in {inputs.thresholds.horizon_seconds:g} s"
        )
    restraint = _not_now(inputs, plan, HoldKind.NO_DROP, is_urgent=overload is Overload.NOW)
    if restraint is not None:
        return Restraint(restraint.rule, f"{why}: {restraint.detail}")
    candidates = make_candidates(plan.groups, inputs.workers, inputs.loads)
    dropped = plan_drop(
        candidates,
        num_merges=copies_to_free(pressure.lacking_blocks, candidates),
        needed_ratio=needed_ratio(inputs),
    )
    if dropped is None:
        return Restraint(Rule.NOTHING_TO_DROP, f"{why}: no groups are left that can be merged")
    if dropped.capacity_blocks <= pressure.capacity_blocks:
        return Restraint(
            Rule.NOTHING_TO_DROP, f"{why}: a drop would leave {dropped.capacity_blocks} blocks"
        )
    return Target(
        rule=Rule.OVERLOAD if overload is Overload.NOW else Rule.FORECAST,
        state=LayoutState.DROPPING,
        groups=dropped.groups(next_epoch(inputs)),
        cause=f"{why}: {describe_drop(dropped, pressure.capacity_blocks)}",
        hold=active_hold(plan, inputs.now),
    )


def _restore(inputs: Inputs, plan: Plan, pressure: Pressure) -> Target | Restraint | None:
    if pressure.is_rising(inputs.thresholds) or not pressure.is_window_full:
        return None
    restored = plan_restore(
        make_candidates(plan.groups, inputs.workers, inputs.loads),
        demand_blocks=pressure.peak_blocks,
        restore_ratio=inputs.thresholds.restore_ratio,
        epoch=next_epoch(inputs),
    )
    if restored is None:
        return None
    why = (
        f"demand at most {pressure.peak_blocks} blocks in the last"
        f" {inputs.thresholds.window_seconds:g} s"
    )
    if (restraint := _not_now(inputs, plan, HoldKind.NO_RESTORE, is_urgent=False)) is not None:
        return Restraint(restraint.rule, f"{why}: {restraint.detail}")
    return Target(
        rule=Rule.CALM,
        state=LayoutState.RESTORING,
        groups=restored.groups,
        cause=f"{why}: KV blocks {pressure.capacity_blocks} -> {restored.capacity_blocks}",
        hold=active_hold(plan, inputs.now),
    )


def _release_draining(inputs: Inputs, plan: Plan) -> Target | None:
    """A worker that leaves takes layers with it that others need: they get them back first.

    Where all members leave, nobody does: their pipeline finishes what it runs.
    """
    leaving: set[str] = set()
    hit: set[str] = set()
    for group in plan.groups:
        members = {member.worker_id for member in group.members}
        draining = {w for w in members if inputs.workers[w].state is WorkerState.DRAINING}
        if draining and draining != members:
            leaving |= draining
            hit.add(group.group_id)
    if not leaving or inputs.now < plan.not_before:
        return None
    restored = plan_whole(make_candidates(plan.groups, inputs.workers, inputs.loads), hit, leaving)
    if restored is None:
        return None
    return Target(
        rule=Rule.DRAINING,
        state=LayoutState.RESTORING,
        groups=restored.groups,
        cause=f"{', '.join(sorted(leaving))} is being drained",
        hold=active_hold(plan, inputs.now),
    )


def _not_now(inputs: Inputs, plan: Plan, kind: HoldKind, *, is_urgent: bool) -> Restraint | None:
    """What stands against a transition."""
    if plan.hold is not None and plan.hold.forbids(kind, inputs.now):
        until = f"for {plan.hold.until - inputs.now:.0f} s more" if plan.hold.until else "for good"
        return Restraint(Rule.HELD_BY_OPERATOR, f"an operator's order holds {until}")
    earliest = plan.not_before
    if not is_urgent:
        earliest = max(earliest, plan.settled_at + inputs.thresholds.dwell_seconds)
    if inputs.now < earliest:
        wait = earliest - inputs.now
        return Restraint(
            Rule.TOO_SOON, f"the last transition ended a moment ago, {wait:.0f} s left"
        )
    return None
