"""The worker process: joins the cluster, takes requests from the bus, runs them, sends tokens back.

    bus --gen, ctl--> Intake --commands--> engine thread
    bus <--frames---- TokenPublisher <--- reports ---+---> LoadReporter --load--> bus
    members bucket <-- Lease            plan bucket, other workers <--> GroupService

Everything here runs on the event loop; only the engine thread (`engine_thread.py`) touches the
model. Without planner or bus the worker keeps its layout and finishes what it runs.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from dataclasses import asdict
from typing import Any

import structlog

from services.worker.admission import AdmissionLimits
from services.worker.build import build_engine
from services.worker.draining import why_stay
from services.worker.engine_thread import Drain as DrainEngine
from services.worker.engine_thread import EngineReport, EngineThread
from services.worker.group_service import GroupService
from services.worker.identity import Identity, ModelFacts
from services.worker.intake import Intake
from services.worker.links.totals import LinkTotals
from services.worker.load_reporter import LoadReporter
from services.worker.member_state import Placement
from services.worker.metrics import WorkerMetrics
from services.worker.outbound import TokenPublisher
from services.worker.settings import WorkerSettings
from services.worker.streams import StreamTable
from shared.buckets import open_members
from shared.bus.base import Bus
from shared.lifecycle import BackgroundTasks, fail_when_closed, stop_on_signals
from shared.logging import configure_logging
from shared.membership import Lease, MemberEvent, MemberEventKind, MemberView
from shared.messages import RouterInfo, WorkerInfo, WorkerState
from shared.metrics import AdminServer, BusCollector, admin_app
from shared.service_bus import service_bus
from shared.subjects import Subjects, worker_key

#: How often finished streams are forgotten.
_HOUSEKEEPING_SECONDS = 5.0
#: After an outage of the bus a router may be slower to come back than the worker.
_RECONNECT_GRACE_SECONDS = 3.0
#: How long a look into the engine may take: a long batch has to end first.
_INSPECT_SECONDS = 5.0
#: How long the engine thread gets to finish its step at the end.
_ENGINE_STOP_SECONDS = 30.0


async def run(settings: WorkerSettings) -> None:
    """Run a worker until SIGTERM or Ctrl-C, then drain it.

    Raises:
        ConfigError: the settings cannot work (model, memory, NATS).
    """
    configure_logging("worker", settings.worker_id, settings.log_format, settings.log_level)
    stop = stop_on_signals()
    async with service_bus(settings, "worker", settings.worker_id, stop) as bus:
        if bus is not None:
            await WorkerService(settings, bus).run(stop)


class WorkerService:
    """One worker on a connected bus."""

    def __init__(self, settings: WorkerSettings, bus: Bus) -> None:
        self._settings = settings
        self._bus = bus
        self._subjects = Subjects(settings.deployment)
        self._identity = _identity(settings)
        self._state = WorkerState.STARTING
        self._placement = Placement()
        self._streams = StreamTable()
        self._link_totals = LinkTotals()
        self._metrics = WorkerMetrics(BusCollector(bus), self._link_totals)
        self._reports: asyncio.Queue[EngineReport] = asyncio.Queue()
        self._news = asyncio.Event()  # of streams, groups and members, for whoever drains
        self._disconnects_seen = bus.stats.disconnects
        self._patient_until = float("-inf")
        self._log = structlog.get_logger(component="worker")

    async def run(self, stop: asyncio.Event) -> None:
        """Load the model, serve until `stop` is set, drain."""
        engine = EngineThread(
            lambda: build_engine(self._settings),
            asyncio.get_running_loop(),
            self._reports.put_nowait,
        )
        loading = engine.start()
        stopped = asyncio.create_task(stop.wait(), name="stop while loading")
        outcomes: set[asyncio.Future[Any]] = {loading, stopped}
        await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        try:
            if loading.done():
                await self._serve(engine, loading.result(), stop)
            else:
                self._log.info("stopped while loading")
        finally:
            await engine.stop(_ENGINE_STOP_SECONDS)

    async def _serve(self, engine: EngineThread, facts: ModelFacts, stop: asyncio.Event) -> None:
        self._facts = facts
        members = await open_members(self._bus, self._subjects, self._settings.lease_ttl_seconds)
        self._lease = Lease(
            self._bus,
            members,
            worker_key(self._identity.worker_id),
            self._info(),
            self._settings.lease_ttl_seconds,
        )
        self._view = view = MemberView(self._bus, members, self._settings.lease_ttl_seconds)
        self._engine = engine
        self._intake = await self._make_intake(engine)
        self._reporter = LoadReporter(
            self._bus, self._subjects, self._identity.worker_id, facts, self._placement
        )
        self._groups = GroupService(
            self._settings,
            self._bus,
            engine,
            self._streams,
            self._publisher,
            self._placement,
            self._link_totals,
            on_change=self._on_groups_changed,
        )
        view.subscribe(self._on_member)
        admin = await self._start_admin()
        try:
            await self._groups.start()
            async with BackgroundTasks() as tasks:
                tasks.spawn(fail_when_closed(self._bus), "bus closed")
                tasks.spawn(engine.wait_finished(), "engine")
                tasks.spawn(self._publish_reports(), "token frames")
                tasks.spawn(self._lease.run(), "lease")
                tasks.spawn(view.run(), "members")
                tasks.spawn(self._groups.run(), "layout")
                tasks.spawn(
                    self._reporter.run(self._settings.load_interval_seconds), "load reports"
                )
                tasks.spawn(self._forget_finished(), "housekeeping")
                await self._listen()
                self._enter(WorkerState.READY)
                self._log.info("worker ready", **asdict(facts))
                await tasks.run_until(stop)
                await self._drain()
        finally:
            await self._groups.close()
            if admin is not None:
                await admin.stop()

    # --- assembly --------------------------------------------------------------------------------

    async def _make_intake(self, engine: EngineThread) -> Intake:
        reply = await self._bus.subscribe_no_responders(self._on_no_responders)
        self._publisher = TokenPublisher(
            self._bus, self._subjects, self._identity.worker_id, self._placement, reply
        )
        limits = AdmissionLimits(
            max_model_len=self._facts.max_model_len,
            vocab_size=self._facts.vocab_size,
            max_num_requests=self._settings.max_num_requests,
        )
        return Intake(
            self._bus,
            self._subjects,
            engine,
            self._streams,
            self._publisher,
            self._placement,
            limits,
            on_drain=self._begin_drain,
        )

    async def _start_admin(self) -> AdminServer | None:
        if self._settings.admin_port is None:
            return None
        app = admin_app(
            self._metrics.registry,
            self._unready_reasons,
            self._debug_state,
            {"engine": self._inspect_engine},
        )
        server = AdminServer(app, self._settings.admin_host, self._settings.admin_port)
        await server.start()
        self._log.info("admin endpoints", host=self._settings.admin_host, port=server.port)
        return server

    async def _listen(self) -> None:
        worker_id = self._identity.worker_id
        await self._bus.subscribe(self._subjects.control(worker_id), self._intake.on_control)
        await self._bus.subscribe(self._subjects.generate(worker_id), self._intake.on_generate)

    # --- what happens ----------------------------------------------------------------------------

    async def _publish_reports(self) -> None:
        """Record what the engine says and tell the routers; ends with the service."""
        while True:
            report = await self._reports.get()
            if report.facts is not None:
                self._facts = report.facts
                self._lease.update(self._info())
            for event in report.events:
                await self._groups.handle(event)
            by_router = self._streams.record(report.items, time.monotonic())
            await self._publisher.send(by_router)
            self._metrics.observe(report)
            self._reporter.update(report.load, self._intake.received(report.num_added))
            self._news.set()

    async def _forget_finished(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_SECONDS)
            self._streams.forget_finished(time.monotonic())

    async def _on_no_responders(self, subject: str) -> None:
        """A token frame found nobody: its router is gone, or not back yet from an outage."""
        now, disconnects = time.monotonic(), self._bus.stats.disconnects
        if disconnects != self._disconnects_seen:
            self._disconnects_seen = disconnects
            self._patient_until = now + _RECONNECT_GRACE_SECONDS
        if now < self._patient_until:
            return
        for router_id in self._streams.routers():
            if self._subjects.tokens(router_id) == subject:
                self._intake.cancel_router(router_id)

    def _on_member(self, event: MemberEvent) -> None:
        self._news.set()
        if isinstance(event.info, RouterInfo) and event.kind in (
            MemberEventKind.LEFT,
            MemberEventKind.RESTARTED,
        ):
            self._intake.cancel_router(event.info.router_id)

    def _on_groups_changed(self) -> None:
        self._lease.update(self._info())
        self._reporter.wake()
        self._news.set()

    # --- state -----------------------------------------------------------------------------------

    def _enter(self, state: WorkerState) -> None:
        self._state = state
        self._lease.update(self._info())

    def _info(self) -> WorkerInfo:
        return self._identity.info(self._facts, self._shown_state, self._placement.epoch)

    @property
    def _shown_state(self) -> WorkerState:
        """The state, unless the worker is ready but for its layers."""
        if self._state is WorkerState.READY and self._groups.is_reloading:
            return WorkerState.RELOADING
        return self._state

    def _begin_drain(self) -> None:
        """Refuse new requests from now on; those accepted are finished. Idempotent."""
        if self._state is WorkerState.DRAINING:
            return
        self._log.info("draining", requests=self._streams.num_open)
        self._intake.is_draining = True
        self._groups.drain()
        self._engine.submit(DrainEngine())
        self._reporter.set_draining()
        self._enter(WorkerState.DRAINING)

    async def _drain(self) -> None:
        """Finish what runs and serve a pipeline while it is needed, within the time set; leave."""
        self._begin_drain()
        try:
            async with asyncio.timeout(self._settings.drain_timeout_seconds):
                while self._why_stay():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            self._log.warning("drain timed out", reason=self._why_stay())
        if (error := self._metrics.prediction_error) is not None:
            mean, p90 = round(error.mean, 3), round(error.p90, 3)
            self._log.info("cost model while serving", mean_error=mean, p90_error=p90)
        await self._lease.release()

    def _why_stay(self) -> str:
        return why_stay(
            self._identity.worker_id,
            self._streams.num_open,
            self._groups.needed_in,
            self._view.workers,
        )

    def _unready_reasons(self) -> list[str]:
        reasons = []
        if not self._bus.is_connected:
            reasons.append("not connected to NATS")
        if self._shown_state is not WorkerState.READY:
            reasons.append(f"the worker is {self._shown_state.value}")
        elif not self._placement.group_id:
            reasons.append("no plan places this worker in a group")
        return reasons

    async def _inspect_engine(self) -> dict[str, object]:
        return asdict(await self._engine.inspect(_INSPECT_SECONDS))

    def _debug_state(self) -> dict[str, object]:
        return {
            "worker": self._info().model_dump(mode="json"),
            "placement": asdict(self._placement),
            "open_streams": self._streams.num_open,
        }


def _identity(settings: WorkerSettings) -> Identity:
    return Identity(
        worker_id=settings.worker_id,
        incarnation=secrets.token_hex(8),
        host=socket.gethostname(),
        pid=os.getpid(),
        model_id=settings.model,
        started_at=time.time(),
    )
