"""The next step of a transition that is under way. Pure; the steps are drawn in `transition.py`."""

from __future__ import annotations

from typing import Any

from services.planner.drafts import (
    draft,
    draft_layout,
    failed_groups,
    layout_now,
    redraft,
    why_rewrite,
)
from services.planner.inputs import Inputs
from services.planner.layout_policy import Layout, describe_change
from services.planner.rules import APPLIED, Action, Decision, Rule
from services.planner.transition import Move, Stage, changed_groups, participants, progress
from shared.layout import Change, GroupPlan, Plan, Transition
from shared.messages import AdminReply


class Underway:
    """The next step of the transition `change` of the plan `previous`."""

    def __init__(self, inputs: Inputs, previous: Plan, change: Change) -> None:
        self._inputs = inputs
        self._plan = previous
        self._change = change
        self._standing = progress(
            previous,
            inputs.workers,
            inputs.acks,
            membership_held=inputs.membership_held,
            settle_seconds=inputs.timing.settle_seconds,
            now=inputs.now,
        )
        self._reply = (
            AdminReply(error=f"the cluster is {previous.state.value}: try again when it is done")
            if inputs.wish
            else None
        )

    def decide(self) -> Decision:
        """Go on, give up, or wait."""
        rewrite = why_rewrite(self._inputs, self._plan)
        if rewrite is not None:
            again = redraft(self._inputs, self._plan)
            return Decision(Action.PUBLISH, rewrite, again, reply=self._reply)
        match self._standing.move:
            case Move.COMMIT:
                return self._commit()
            case Move.FALL_BACK:
                return self._fall_back()
            case Move.BREAK_UP:
                return self._break_up()
            case Move.FINISH:
                return self._finish()
            case None:
                return self._wait()

    def _commit(self) -> Decision:
        plan = draft(
            self._inputs,
            self._plan,
            deadline_at=self._inputs.now + self._inputs.timing.commit_seconds,
            change=self._change.model_copy(update={"phase_seconds": self._phase_seconds()}),
        )
        return self._publish(Rule.ALL_PREPARED, plan)

    def _fall_back(self) -> Decision:
        """Nobody has given anything up: the groups before go on."""
        layout = self._layout(self._change.previous_groups)
        plan = self._resting(layout, hold=self._change.previous_hold)
        return self._publish(Rule.FELL_BACK, plan, f"fell back: {self._standing.detail}")

    def _break_up(self) -> Decision:
        """Groups that are hit cannot serve; other groups of the transition go on."""
        made = {group.group_id: group for group in changed_groups(self._plan)}
        hit = frozenset(
            group_id
            for group_id, group in made.items()
            if any(member.worker_id in self._standing.troubled for member in group.members)
        )
        layout = self._layout(self._plan.groups, hit)
        result = f"broke up {', '.join(sorted(hit)) or 'nothing'}: {self._standing.detail}"
        if not made.keys() - hit or layout.groups == self._plan.groups:
            return self._publish(Rule.GROUP_BROKE, self._resting(layout), result)
        return self._publish(Rule.GROUP_BROKE, self._going_on(layout, result), result)

    def _finish(self) -> Decision:
        plan = self._resting(self._layout(self._plan.groups), not_before=0.0)
        if self._standing.detail:
            return self._publish(
                Rule.SETTLED, plan, f"not settled in time: {self._standing.detail}"
            )
        return self._publish(Rule.SETTLED, plan, APPLIED)

    def _wait(self) -> Decision:
        layout = self._layout(self._plan.groups)
        if self._standing.stage is Stage.SETTLING and layout.groups != self._plan.groups:
            plan = self._going_on(layout, describe_change(self._plan, layout))
            return self._publish(Rule.WORKERS_CHANGED, plan)
        waiting = ", ".join(sorted(self._standing.waiting_for))
        return Decision(
            Action.KEEP,
            Rule.IN_TRANSITION,
            verdicts=layout.verdicts,
            detail=f"{self._standing.stage.value}: waiting for {waiting}",
            reply=self._reply,
        )

    def _layout(
        self, groups: tuple[GroupPlan, ...], broken: frozenset[str] = frozenset()
    ) -> Layout:
        """What of `groups` can serve; while membership is held, absence breaks none."""
        return layout_now(
            self._inputs,
            self._plan,
            groups,
            broken | failed_groups(self._inputs, groups),
            absence_counts=not self._inputs.membership_held,
        )

    def _resting(self, layout: Layout, **fields: Any) -> Plan:
        """A plan with which the transition is over."""
        now = self._inputs.now
        values = {
            "reason": self._standing.detail or self._plan.reason,
            "settled_at": now,
            "not_before": now + self._inputs.thresholds.dwell_seconds,
        }
        return draft_layout(self._inputs, self._plan, layout, **{**values, **fields})

    def _going_on(self, layout: Layout, reason: str) -> Plan:
        """The same transition with other groups."""
        return draft_layout(
            self._inputs,
            self._plan,
            layout,
            state=self._plan.state,
            reason=reason,
            deadline_at=self._inputs.now + self._inputs.timing.commit_seconds,
            change=self._change,
        )

    def _publish(self, rule: Rule, plan: Plan, result: str = "") -> Decision:
        finished = None
        if result:
            finished = Transition(
                term=self._plan.term,
                epoch=self._plan.epoch,
                state=self._plan.state,
                cause=self._change.cause,
                started_at=self._change.started_at,
                phase_seconds=self._phase_seconds(),
                result=result,
            )
        return Decision(
            Action.PUBLISH, rule, plan, detail=result, finished=finished, reply=self._reply
        )

    def _phase_seconds(self) -> dict[str, float]:
        """What the phases took until now."""
        started, now = self._plan.created_at, self._inputs.now
        spent = dict(self._change.phase_seconds)
        match self._standing.stage:
            case Stage.PREPARING:
                return spent | {"prepare": round(now - started, 6)}
            case Stage.COMMITTING:
                return spent | {"commit": round(now - started, 6)}
        heard = [
            self._inputs.applied_at.get(worker_id, now)
            for worker_id in participants(self._plan, self._inputs.workers)
        ]
        applied = min(max([started, *heard]), now)
        commit_seconds = spent.get("commit", applied - started)
        return spent | {
            "commit": round(commit_seconds, 6),
            "exchange": round(now - started - commit_seconds, 6),
        }
