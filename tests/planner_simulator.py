"""A cluster without processes: workers that follow plans, one planner's decisions, simulated time.

Workers do what a worker must (`SimWorker`), requests arrive, wait and hold blocks (`SimLoad`).
Everything is deterministic; the planner's pure parts are the real ones.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from services.planner.candidates import total_whole_blocks
from services.planner.decision import decide
from services.planner.inputs import Inputs, Timing
from services.planner.pressure import GroupLoad, PressureMonitor, Thresholds
from services.planner.rules import Decision
from shared.layout import GroupPlan, LayoutState, Plan, PlanPhase, Span, Transition
from shared.messages import AckState, AdminRequest, PlanAck, WorkerInfo
from tests.planner_support import NUM_LAYERS, blocks_of, figures_of, worker_info

WHOLE = Span(start=0, end=NUM_LAYERS)


class Mood(Enum):
    """How a worker takes plans."""

    PLAYS_ALONG = "plays along"
    SILENT = "silent"
    REFUSES = "refuses"


@dataclass
class SimWorker:
    """A worker's side of the contract: what it holds, what it serves, what it says."""

    info: WorkerInfo
    mood: Mood = Mood.PLAYS_ALONG
    ack: PlanAck | None = None
    serving: GroupPlan | None = None
    prepared: GroupPlan | None = None
    seen: tuple[int, int] = (0, 0)

    def holds(self, span: Span) -> bool:
        return any(held.start <= span.start and span.end <= held.end for held in self.info.layers)

    def hold(self, span: Span) -> None:
        self.info = self.info.model_copy(update=figures_of(span))

    def say(self, plan: Plan, state: AckState) -> None:
        self.ack = PlanAck(
            worker_id=self.info.worker_id, term=plan.term, epoch=plan.epoch, state=state
        )

    def follow(self, plan: Plan, living: dict[str, SimWorker]) -> None:
        """See the plan as it is in the store."""
        if self.serving is not None and self._is_broken(self.serving, living):
            self.serving = None
            self.hold(WHOLE)
        if plan.version < self.seen or self.mood is Mood.SILENT:
            return
        is_news = plan.version > self.seen
        self.seen = plan.version
        if plan.phase is PlanPhase.PREPARE:
            if is_news:
                self._prepare(plan)
        elif is_news or self._is_idle_replica(plan):
            self._commit(plan, living)
        elif self.ack is not None and self.ack.state is AckState.APPLIED and plan.change:
            self.say(plan, AckState.SETTLED)

    def _is_idle_replica(self, plan: Plan) -> bool:
        """Whether it could not serve before, and now that it is whole again can."""
        group = plan.group_of(self.info.worker_id)
        return self.serving is None and group is not None and len(group.members) == 1

    def _is_broken(self, group: GroupPlan, living: dict[str, SimWorker]) -> bool:
        return any(
            member.worker_id not in living
            or member.incarnation not in ("", living[member.worker_id].info.incarnation)
            for member in group.members
        )

    def _prepare(self, plan: Plan) -> None:
        if self.mood is Mood.REFUSES:
            self.say(plan, AckState.REFUSED)
            return
        self.prepared = plan.group_of(self.info.worker_id)
        if plan.state is LayoutState.RESTORING and self.prepared is not None:
            self.hold(WHOLE)
        self.say(plan, AckState.PREPARED)

    def _commit(self, plan: Plan, living: dict[str, SimWorker]) -> None:
        group = plan.group_of(self.info.worker_id)
        if group is None:
            self.serving = None
            self.hold(WHOLE)
            self.say(plan, AckState.APPLIED)
            return
        span = next(m.span for m in group.members if m.worker_id == self.info.worker_id)
        is_known = group in (self.serving, self.prepared) or len(group.members) == 1
        if self.mood is Mood.REFUSES or not is_known or not self.holds(span):
            self.serving = None
            self.hold(WHOLE)
            self.say(plan, AckState.FAILED)
            return
        if group != self.serving:
            self._check_others_keep(group, span, living)
            self.serving = group
            self.hold(span)
        self.say(plan, AckState.APPLIED)

    def _check_others_keep(
        self, group: GroupPlan, span: Span, living: dict[str, SimWorker]
    ) -> None:
        """What this worker gives up must be with the member that shall keep it, if that lives."""
        for member in group.members:
            other = living.get(member.worker_id)
            if other is None or other is self or other.info.incarnation != member.incarnation:
                continue
            assert other.holds(member.span), f"{member.worker_id} does not hold {member.span}"


@dataclass
class SimCluster:
    """The store, the workers, and one planner after the other."""

    may_drop: bool = False
    thresholds: Thresholds = field(default_factory=Thresholds)
    timing: Timing = field(default_factory=lambda: Timing(3.0, 5.0, 3.0, 5.0))
    workers: dict[str, SimWorker] = field(default_factory=dict)
    stored: Plan | None = None
    term: int = 1
    now: float = 1000.0
    wish: AdminRequest | None = None
    versions: list[tuple[int, int]] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    _remembered: Plan | None = None
    _joined: int = 0

    def __post_init__(self) -> None:
        self._monitor = PressureMonitor(self.thresholds)

    def join(self, worker_id: str, **changes: Any) -> None:
        self._joined += 1
        changes = {"incarnation": str(self._joined), **changes}
        self.workers[worker_id] = SimWorker(worker_info(worker_id, **changes))

    def change_leader(self) -> None:
        """Another planner takes over: it knows what is in the store."""
        self.term = max(self.term, self.stored.term if self.stored else 0) + 1
        self._remembered = self.stored
        self._monitor = PressureMonitor(self.thresholds)

    @property
    def plan(self) -> Plan:
        assert self.stored is not None
        return self.stored

    def tick(self, seconds: float, loads: dict[str, GroupLoad] | None = None) -> Decision:
        """Let time pass, workers see the plan, the planner decide."""
        self.now += seconds
        if self.stored is not None:
            for worker in list(self.workers.values()):
                worker.follow(self.stored, self.workers)
        decision = self._decide(loads)
        self.decisions.append(decision)
        if decision.plan is not None:
            assert decision.plan.version > (self.stored.version if self.stored else (0, 0))
            self.stored = self._remembered = decision.plan
            self.versions.append(decision.plan.version)
            self.term = max(self.term, decision.plan.term)
        if decision.finished is not None:
            self.transitions.append(decision.finished)
        if decision.reply is not None:
            self.wish = None
        return decision

    def _decide(self, loads: dict[str, GroupLoad] | None) -> Decision:
        infos = {worker_id: worker.info for worker_id, worker in self.workers.items()}
        groups = self.stored.serving_groups if self.stored else ()
        known = loads if loads is not None else {}
        unknown = [] if loads is not None else [group.leader for group in groups]
        pressure = self._monitor.observe(
            known, total_whole_blocks(groups, infos), unknown, self.now
        )
        acks = {w: worker.ack for w, worker in self.workers.items() if worker.ack is not None}
        return decide(
            Inputs(
                term=self.term,
                workers=infos,
                stored=self.stored,
                remembered=self._remembered,
                applied=self._applied(list(acks.values())),
                acks=acks,
                pressure=pressure,
                loads=known,
                wish=self.wish,
                may_drop=self.may_drop,
                thresholds=self.thresholds,
                timing=self.timing,
                now=self.now,
            )
        )

    def _applied(self, acks: list[PlanAck]) -> tuple[int, int]:
        good = [ack for ack in acks if ack.state not in (AckState.REFUSED, AckState.FAILED)]
        return (
            max((ack.term for ack in good), default=0),
            max((ack.epoch for ack in good), default=0),
        )


@dataclass(frozen=True)
class SimRequest:
    """A request that holds its blocks for a while once it runs."""

    blocks: int
    seconds: float
    ends_at: float = 0.0


class SimLoad:
    """Requests of the whole cluster: one queue, each to the group with the most free blocks."""

    def __init__(self) -> None:
        self.waiting: deque[SimRequest] = deque()
        self.running: dict[str, list[SimRequest]] = {}

    def arrive(self, count: int, blocks: int, seconds: float) -> None:
        self.waiting.extend(SimRequest(blocks, seconds) for _ in range(count))

    def run(self, groups: tuple[GroupPlan, ...], now: float) -> dict[str, GroupLoad]:
        """Finish and start what can be; requests of groups that are gone move to those there."""
        ids = {group.group_id for group in groups}
        for gone in self.running.keys() - ids:
            orphans = self.running.pop(gone)
            heirs = self.running.setdefault(groups[0].group_id, [])
            heirs.extend(orphans)
        for running in self.running.values():
            running[:] = [request for request in running if request.ends_at > now]
        while self.waiting:
            group = max(groups, key=self._free)
            if self._free(group) < self.waiting[0].blocks:
                break
            request = self.waiting.popleft()
            ends_at = now + request.seconds
            self.running.setdefault(group.group_id, []).append(replace(request, ends_at=ends_at))
        share = sum(request.blocks for request in self.waiting) // max(1, len(groups))
        return {
            group.group_id: GroupLoad(blocks_of(group), self._used(group), share)
            for group in groups
        }

    def _used(self, group: GroupPlan) -> int:
        return sum(request.blocks for request in self.running.get(group.group_id, []))

    def _free(self, group: GroupPlan) -> int:
        return blocks_of(group) - self._used(group)
