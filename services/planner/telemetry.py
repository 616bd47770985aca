"""What the planner tells of its decisions: a log line for news, metrics for everything."""

from __future__ import annotations

from collections import Counter as CountOf

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.planner.decision import Action, Decision, Inputs
from services.planner.layout_policy import WorkerVerdict
from services.planner.observations import APPLIED
from shared.layout import Transition

APPLY_BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Telemetry:
    """The planner's metrics and decision log."""

    def __init__(self, registry: CollectorRegistry, planner_id: str) -> None:
        self._log = structlog.get_logger(component="planner", planner=planner_id)
        self._last_told: object = None
        prefix = "kunserve_planner_"
        self._decisions = Counter(
            prefix + "decisions",
            "decisions taken while leading",
            ["action", "rule"],
            registry=registry,
        )
        self._is_leader = Gauge(
            prefix + "is_leader", "1 while this planner leads", registry=registry
        )
        self._term = Gauge(prefix + "plan_term", "term of the plan", registry=registry)
        self._epoch = Gauge(prefix + "plan_epoch", "epoch of the plan", registry=registry)
        self._groups = Gauge(prefix + "plan_groups", "groups of the plan", registry=registry)
        self._workers = Gauge(
            prefix + "workers", "living workers by verdict", ["verdict"], registry=registry
        )
        self._stale = Gauge(
            prefix + "stale_inputs", "serving workers whose load is not known", registry=registry
        )
        self._held = Gauge(
            prefix + "membership_held", "1 while absence proves nothing", registry=registry
        )
        self._apply_seconds = Histogram(
            prefix + "plan_apply_seconds",
            "from publishing a plan to the last acknowledgement",
            buckets=APPLY_BUCKETS_SECONDS,
            registry=registry,
        )

    def led(self, leads: bool) -> None:
        """Whether this planner leads."""
        self._is_leader.set(float(leads))

    def decided(self, inputs: Inputs, decision: Decision) -> None:
        """Tell one decision; the log has it only where it differs from the one before."""
        self._decisions.labels(decision.action.value, decision.rule.value).inc()
        verdicts = CountOf(decision.verdicts.values())
        for verdict in WorkerVerdict:
            self._workers.labels(verdict.value).set(verdicts[verdict])
        self._stale.set(len(inputs.stale_loads))
        self._held.set(float(inputs.membership_held))
        shown = decision.plan or inputs.stored
        if shown is not None:
            self._term.set(shown.term)
            self._epoch.set(shown.epoch)
            self._groups.set(len(shown.groups))
        told = (decision.action, decision.rule, dict(decision.verdicts), inputs.stale_loads)
        if decision.action is Action.PUBLISH or told != self._last_told:
            self._last_told = told
            self._tell(inputs, decision)

    def settled(self, transition: Transition, seconds: float) -> None:
        """Tell the outcome of a plan."""
        if transition.result == APPLIED:
            self._apply_seconds.observe(seconds)
        self._log.info(
            "planner.plan_settled",
            term=transition.term,
            epoch=transition.epoch,
            result=transition.result,
            seconds=round(seconds, 3),
        )

    def _tell(self, inputs: Inputs, decision: Decision) -> None:
        plan = decision.plan
        self._log.info(
            "planner.decision",
            action=decision.action.value,
            rule=decision.rule.value,
            term=inputs.term,
            workers={worker: verdict.value for worker, verdict in decision.verdicts.items()},
            stale_loads=sorted(inputs.stale_loads),
            membership_held=inputs.membership_held,
            applied=list(inputs.applied),
            stored=list(inputs.stored.version) if inputs.stored else None,
            result=(
                {"version": list(plan.version), "groups": len(plan.groups), "reason": plan.reason}
                if plan
                else None
            ),
        )
