"""One planner: what it hears, what it decides, what it shows.

All effects happen in `Planner.step`, one at a time; handlers only note what they heard and wake it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import structlog

from services.planner.admin import AdminDesk
from services.planner.candidates import total_whole_blocks
from services.planner.decision import decide
from services.planner.inputs import Inputs
from services.planner.leader import LeaderElection, Role
from services.planner.observations import AckBoard, LoadBoard, QueueBoard
from services.planner.plan_store import PlanStore
from services.planner.pressure import Pressure, PressureMonitor, Thresholds
from services.planner.rules import Decision
from services.planner.settings import PlannerSettings, Policy
from services.planner.telemetry import Telemetry
from services.planner.wishes import Wishes
from shared.bus.base import Bus, BusError, BusMessage, KeyValue, RevisionConflictError
from shared.layout import Plan, Transition
from shared.lifecycle import BackgroundTasks
from shared.membership import RENEWALS_PER_TTL, MemberEvent, MemberEventKind, MemberView
from shared.messages import AdminReply, LoadReport, PlanAck, QueueReport, WorkerInfo
from shared.subjects import Subjects
from shared.wire import MessageError

#: How often the leader looks at the load, unless something wakes it earlier.
LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Buckets:
    """The key-value buckets a planner works with."""

    members: KeyValue
    leader: KeyValue
    plan: KeyValue
    acks: KeyValue


class Planner:
    """One planner. The service runs it with `start` and ends it with `leave`.

    Args:
        clock: monotonic seconds; injected for tests.
    """

    def __init__(
        self,
        bus: Bus,
        settings: PlannerSettings,
        buckets: Buckets,
        telemetry: Telemetry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        ttl = settings.lease_ttl_seconds
        self._bus = bus
        self._settings = settings
        self._telemetry = telemetry
        self._clock = clock
        self._subjects = Subjects(settings.deployment)
        self._acks_bucket = buckets.acks
        self._store = PlanStore(buckets.plan)
        self._view = MemberView(bus, buckets.members, ttl, clock)
        self._view.subscribe(self._on_member)
        self._election = LeaderElection(buckets.leader, settings.planner_id, ttl, clock)
        self._wake = asyncio.Event()
        self._wishes = Wishes(self._wake.set)
        self._desk = AdminDesk(bus, self._subjects, lambda: self._view.workers, self._wishes.ask)
        self._thresholds = Thresholds(dwell_seconds=settings.min_dwell_seconds)
        self._timing = settings.timing
        self._monitor = PressureMonitor(self._thresholds)
        self._pressure: Pressure | None = None
        self._acks = AckBoard(settings.ack_timeout_seconds)
        self._loads = LoadBoard(settings.load_stale_seconds)
        self._queues = QueueBoard(settings.load_stale_seconds)
        self._remembered: Plan | None = None
        self._trouble = ""
        self._log = structlog.get_logger(component="planner", planner=settings.planner_id)
        bus.on_reconnect(self._on_reconnect)

    @property
    def role(self) -> Role:
        """Whether it leads."""
        return self._election.role

    @property
    def _look_seconds(self) -> float:
        """Longest time between two looks at the load; a standby does not look."""
        return LOOK_SECONDS if self.role is Role.LEADING else math.inf

    async def start(self, tasks: BackgroundTasks) -> None:
        """Begin to listen and to decide, in tasks owned by `tasks`."""
        tasks.spawn(self._view.run(), "members")
        tasks.spawn(self._follow_acks(), "acks")
        tasks.spawn(self._desk.run(), "admin")
        tasks.spawn(self._step_for_ever(), "steps")
        await self._bus.subscribe(self._subjects.all_loads, self._on_load)
        await self._bus.subscribe(self._subjects.all_queues, self._on_queue)

    async def leave(self) -> None:
        """Hand over at once instead of letting the lease expire. The tasks have ended before."""
        await self._desk.close()
        await self._election.release()

    # --- what is heard ---------------------------------------------------------------------------

    def _on_member(self, event: MemberEvent) -> None:
        if isinstance(event.info, WorkerInfo):
            if event.kind in (MemberEventKind.LEFT, MemberEventKind.RESTARTED):
                self._loads.forget(event.info.worker_id)
            self._wake.set()

    async def _on_reconnect(self) -> None:
        self._wake.set()

    async def _on_load(self, message: BusMessage) -> None:
        try:
            self._loads.record(LoadReport.decode(message.payload), self._clock())
        except MessageError as error:
            self._log.warning("planner.unreadable_load", error=str(error))

    async def _on_queue(self, message: BusMessage) -> None:
        try:
            self._queues.record(QueueReport.decode(message.payload), self._clock())
        except MessageError as error:
            self._log.warning("planner.unreadable_queue", error=str(error))

    async def _follow_acks(self) -> None:
        async with aclosing(self._acks_bucket.watch()) as changes:
            async for entry in changes:
                if entry.value is None:
                    continue
                try:
                    self._acks.record(PlanAck.decode(entry.value), time.time())
                except MessageError as error:
                    self._log.warning("planner.unreadable_ack", key=entry.key, error=str(error))
                self._wake.set()

    # --- what is done ----------------------------------------------------------------------------

    async def _step_for_ever(self) -> None:
        await self._view.wait_primed()
        pause = self._settings.lease_ttl_seconds / RENEWALS_PER_TTL
        elect_at = self._clock()
        while True:
            self._wake.clear()
            is_due = self._clock() >= elect_at or self.role is Role.STANDBY
            if is_due:
                elect_at = self._clock() + pause
            await self.step(renew=is_due)
            try:
                pause_now = min(elect_at - self._clock(), self._look_seconds)
                async with asyncio.timeout(max(0.0, pause_now)):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def step(self, *, renew: bool = True) -> None:
        """Take part in the election and, while leading, bring the plan up to date."""
        try:
            if renew:
                await self._election.step(await self._known_term())
            self._telemetry.led(self.role is Role.LEADING)
            if self.role is Role.LEADING:
                await self._desk.open()
                await self._lead()
            else:
                await self._desk.close()
        except BusError as error:
            if not self._trouble:
                self._log.warning("planner.step_failed", error=str(error))
            self._trouble = str(error)
        else:
            self._trouble = ""

    async def _known_term(self) -> int:
        """The highest term heard of, for whoever is about to take the lead."""
        if self.role is Role.LEADING:
            return self._election.term
        self._remember((await self._store.read()).plan)
        stored = self._remembered.term if self._remembered else 0
        return max(stored, self._acks.applied[0])

    async def _lead(self) -> None:
        stored = await self._store.read()
        if stored.plan is not None and stored.plan.term > self._election.term:
            self._election.step_down("a planner of a higher term wrote the plan")
            return
        inputs = self._inputs(stored.plan)
        decision = decide(inputs)
        note = self._telemetry.decided(inputs, decision)
        reply = decision.reply
        if decision.plan is not None:
            if not await self._publish(decision, decision.plan, stored.revision):
                reply = AdminReply(error="another planner took over: ask again")
        else:
            self._remember(stored.plan)
        if inputs.wish is not None and reply is not None:
            self._wishes.answer_first(reply)
        if note is not None or decision.finished is not None:
            await self._store.record(decision.finished, note)
        await self._settle()

    def _inputs(self, stored: Plan | None) -> Inputs:
        workers = self._view.workers
        applied_term, applied_epoch = self._acks.applied
        epochs = [info.applied_epoch for info in workers.values()]
        groups = stored.serving_groups if stored is not None else ()
        now = self._clock()
        loads, unknown = self._loads.group_loads(groups, now)
        queued_blocks = self._queues.waiting_blocks(self._loads.block_size, now)
        whole_blocks = total_whole_blocks(groups, workers)
        self._pressure = self._monitor.observe(loads, whole_blocks, unknown, now, queued_blocks)
        return Inputs(
            term=self._election.term,
            workers=workers,
            stored=stored,
            remembered=self._remembered,
            applied=(applied_term, max([applied_epoch, self._loads.newest_epoch, *epochs])),
            acks=self._acks.latest,
            applied_at=self._acks.applied_at,
            membership_held=self._view.is_held,
            pressure=self._pressure,
            loads=loads,
            wish=self._wishes.first,
            may_drop=self._settings.policy is Policy.DROP,
            thresholds=self._thresholds,
            timing=self._timing,
            now=time.time(),
        )

    async def _publish(self, decision: Decision, plan: Plan, revision: int) -> bool:
        """Write the plan; False where this planner does not lead any more."""
        if self.role is not Role.LEADING:
            return False
        try:
            await self._store.write(plan, revision)
        except RevisionConflictError:
            self._election.step_down("another planner wrote the plan")
            return False
        self._election.raise_term(plan.term)
        self._remember(plan)
        self._wake.set()  # the next phase may have its answers already
        if decision.finished is not None:
            self._telemetry.settled(decision.finished)
        if decision.layout_changed:
            superseded = self._acks.expect(plan, self._clock())
            if superseded is not None:
                await self._finish(superseded)
        return True

    async def _settle(self) -> None:
        """Log the transition that is finished, and drop what nobody needs any more."""
        living = self._view.workers
        now = self._clock()
        transition = self._acks.settle(living, now)
        if transition is not None:
            await self._finish(transition)
        if self._view.is_held:
            return
        for worker_id in self._acks.worker_ids - living.keys():
            await self._acks_bucket.delete(worker_id)
            self._acks.forget(worker_id)

    async def _finish(self, transition: Transition) -> None:
        self._telemetry.settled(transition)
        await self._store.record(transition, None)

    def _remember(self, plan: Plan | None) -> None:
        if plan is not None and (
            self._remembered is None or plan.version > self._remembered.version
        ):
            self._remembered = plan

    # --- what is shown ---------------------------------------------------------------------------

    def not_ready_reasons(self) -> list[str]:
        """Why this planner is of no use now; leading and standing by are both ready."""
        reasons = []
        if not self._bus.is_connected:
            reasons.append("not connected to NATS")
        if self._trouble:
            reasons.append(self._trouble)
        return reasons

    def state(self) -> dict[str, Any]:
        """What the planner believes, for /debug/state."""
        plan, pressure = self._remembered, self._pressure
        return {
            "planner_id": self._settings.planner_id,
            "role": self.role.value,
            "term": self._election.term,
            "membership_held": self._view.is_held,
            "workers": {
                worker_id: info.state.value for worker_id, info in self._view.workers.items()
            },
            "routers": sorted(self._view.routers),
            "planners": sorted(self._view.planners),
            "policy": self._settings.policy.value,
            "pressure": pressure.figures() if pressure else None,
            "stale_loads": sorted(pressure.unknown) if pressure else [],
            "plan": plan.model_dump(mode="json") if plan else None,
        }
