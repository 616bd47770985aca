"""What the planner tells of its decisions: a log line for news, metrics for everything."""

from __future__ import annotations

from collections import Counter as CountOf

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.planner.inputs import Inputs
from services.planner.layout_policy import WorkerVerdict
from services.planner.pressure import Pressure
from services.planner.rules import APPLIED, Action, Decision
from shared.layout import DecisionNote, LayoutState, Plan, Transition

APPLY_BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PREFIX = "kunserve_planner_"


class Telemetry:
    """The planner's metrics and decision log."""

    def __init__(self, registry: CollectorRegistry, planner_id: str) -> None:
        self._log = structlog.get_logger(component="planner", planner=planner_id)
        self._last_told: object = None
        self._decisions = Counter(
            _PREFIX + "decisions",
            "decisions taken while leading",
            ["action", "rule"],
            registry=registry,
        )
        self._transitions = Counter(
            _PREFIX + "transitions",
            "drops and restores that ended",
            ["state", "result"],
            registry=registry,
        )
        self._phase_seconds = Histogram(
            _PREFIX + "transition_phase_seconds",
            "time of each phase of a drop or restore",
            ["state", "phase"],
            buckets=APPLY_BUCKETS_SECONDS,
            registry=registry,
        )
        self._apply_seconds = Histogram(
            _PREFIX + "plan_apply_seconds",
            "from publishing a plan to the last acknowledgement",
            buckets=APPLY_BUCKETS_SECONDS,
            registry=registry,
        )
        self._gauges = _Gauges(registry)

    def led(self, leads: bool) -> None:
        """Whether this planner leads."""
        self._gauges.is_leader.set(float(leads))

    def decided(self, inputs: Inputs, decision: Decision) -> DecisionNote | None:
        """Tell one decision; returns a note where it differs in kind from the one before."""
        self._decisions.labels(decision.action.value, decision.rule.value).inc()
        self._gauges.show(inputs, decision)
        unknown = inputs.pressure.unknown if inputs.pressure else frozenset()
        told = (decision.action, decision.rule, dict(decision.verdicts), unknown)
        if decision.action is not Action.PUBLISH and told == self._last_told:
            return None
        self._last_told = told
        figures = inputs.pressure.figures() if inputs.pressure else {}
        self._tell(inputs, decision, figures)
        return DecisionNote(
            action=decision.action.value,
            rule=decision.rule.value,
            detail=decision.detail,
            figures=figures,
            decided_at=inputs.now,
        )

    def settled(self, transition: Transition) -> None:
        """Tell the outcome of a plan."""
        seconds = sum(transition.phase_seconds.values())
        is_applied = transition.result == APPLIED
        if transition.state in (LayoutState.DROPPING, LayoutState.RESTORING):
            state = transition.state.value
            self._transitions.labels(state, "applied" if is_applied else "failed").inc()
            for phase, spent in transition.phase_seconds.items():
                self._phase_seconds.labels(state, phase).observe(spent)
        elif is_applied:
            self._apply_seconds.observe(seconds)
        self._log.info(
            "planner.plan_settled",
            term=transition.term,
            epoch=transition.epoch,
            state=transition.state.value,
            result=transition.result,
            phase_seconds=transition.phase_seconds,
        )

    def _tell(self, inputs: Inputs, decision: Decision, figures: dict[str, float]) -> None:
        self._log.info(
            "planner.decision",
            action=decision.action.value,
            rule=decision.rule.value,
            detail=decision.detail,
            term=inputs.term,
            workers={worker: verdict.value for worker, verdict in decision.verdicts.items()},
            pressure=figures,
            unknown_loads=sorted(inputs.pressure.unknown) if inputs.pressure else [],
            membership_held=inputs.membership_held,
            applied=list(inputs.applied),
            stored=list(inputs.stored.version) if inputs.stored else None,
            result=_summary(decision.plan) if decision.plan else None,
        )


class _Gauges:
    """What is true now."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(_PREFIX + name, text, labels, registry=registry)

        self.is_leader = gauge("is_leader", "1 while this planner leads")
        self._term = gauge("plan_term", "term of the plan")
        self._epoch = gauge("plan_epoch", "epoch of the plan")
        self._groups = gauge("plan_groups", "groups of the plan")
        self._state = gauge("layout_state", "1 for the state of the layout", "state")
        self._workers = gauge("workers", "living workers by verdict", "verdict")
        self._stale = gauge("stale_inputs", "serving groups whose load is not known")
        self._held = gauge("membership_held", "1 while absence proves nothing")
        self._ratio = gauge("pressure_ratio", "demand for KV blocks as a share of capacity")
        self._blocks = gauge("kv_blocks", "KV blocks needed and there", "kind")

    def show(self, inputs: Inputs, decision: Decision) -> None:
        verdicts = CountOf(decision.verdicts.values())
        for verdict in WorkerVerdict:
            self._workers.labels(verdict.value).set(verdicts[verdict])
        self._held.set(float(inputs.membership_held))
        if inputs.pressure is not None:
            self._show_pressure(inputs.pressure)
        plan = decision.plan or inputs.stored
        if plan is not None:
            self._term.set(plan.term)
            self._epoch.set(plan.epoch)
            self._groups.set(len(plan.groups))
            for state in LayoutState:
                self._state.labels(state.value).set(float(state is plan.state))

    def _show_pressure(self, pressure: Pressure) -> None:
        self._stale.set(len(pressure.unknown))
        self._ratio.set(pressure.ratio)
        self._blocks.labels("demand").set(pressure.demand_blocks)
        self._blocks.labels("forecast").set(pressure.forecast_blocks)
        self._blocks.labels("capacity").set(pressure.capacity_blocks)
        self._blocks.labels("whole").set(pressure.whole_blocks)


def _summary(plan: Plan) -> dict[str, object]:
    return {
        "version": list(plan.version),
        "state": plan.state.value,
        "phase": plan.phase.value,
        "groups": len(plan.groups),
        "reason": plan.reason,
    }
