"""The planner process: connects, runs one `Planner`, leaves without making others wait.

    leases, acks, loads --> Planner.step() --> election --> decide() --> plan (compare-and-set)
                               ^ every third of the lease's TTL, and whenever something changed

Several planners may run; only the leader decides.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time

import structlog
from prometheus_client import CollectorRegistry

from services.planner.planner import Buckets, Planner
from services.planner.settings import PlannerSettings
from services.planner.telemetry import Telemetry
from shared.buckets import open_acks, open_leader, open_members, open_plan
from shared.bus.base import Bus
from shared.lifecycle import BackgroundTasks, fail_when_closed, stop_on_signals
from shared.logging import configure_logging
from shared.membership import Lease
from shared.messages import PlannerInfo
from shared.metrics import AdminServer, BusCollector, admin_app, new_registry
from shared.service_bus import service_bus
from shared.subjects import Subjects, planner_key


async def run(settings: PlannerSettings) -> None:
    """Run one planner until SIGTERM or Ctrl-C.

    Raises:
        ConfigError: NATS unreachable or its credentials wrong, a taken admin port.
        KunserveError: NATS shut the connection for good.
    """
    configure_logging("planner", settings.planner_id, settings.log_format, settings.log_level)
    stop = stop_on_signals()
    async with service_bus(settings, "planner", settings.planner_id, stop) as bus:
        if bus is not None:
            await serve(bus, settings, stop)


async def serve(bus: Bus, settings: PlannerSettings, stop: asyncio.Event) -> None:
    """Run one planner on `bus` until `stop` is set."""
    log = structlog.get_logger(component="planner", planner=settings.planner_id)
    registry = new_registry()
    registry.register(BusCollector(bus))
    buckets = await open_buckets(bus, settings)
    planner = Planner(bus, settings, buckets, Telemetry(registry, settings.planner_id))
    lease = Lease(
        bus,
        buckets.members,
        planner_key(settings.planner_id),
        _info(settings),
        settings.lease_ttl_seconds,
    )
    server = await _start_admin_server(planner, settings, registry)
    try:
        async with BackgroundTasks() as tasks:
            tasks.spawn(fail_when_closed(bus), "bus")
            tasks.spawn(lease.run(), "lease")
            await planner.start(tasks)
            log.info("planner.started", admin_port=server.port if server else None)
            await tasks.run_until(stop)
    finally:
        if server is not None:
            await server.stop()
    log.info("planner.leaving")
    await planner.leave()
    await lease.release()


async def open_buckets(bus: Bus, settings: PlannerSettings) -> Buckets:
    """Open the planner's buckets; raises BusError."""
    subjects, ttl = Subjects(settings.deployment), settings.lease_ttl_seconds
    return Buckets(
        members=await open_members(bus, subjects, ttl),
        leader=await open_leader(bus, subjects, ttl),
        plan=await open_plan(bus, subjects),
        acks=await open_acks(bus, subjects),
    )


async def _start_admin_server(
    planner: Planner, settings: PlannerSettings, registry: CollectorRegistry
) -> AdminServer | None:
    if settings.admin_port is None:
        return None
    app = admin_app(registry, planner.not_ready_reasons, planner.state)
    server = AdminServer(app, settings.admin_host, settings.admin_port)
    await server.start()
    return server


def _info(settings: PlannerSettings) -> PlannerInfo:
    return PlannerInfo(
        planner_id=settings.planner_id,
        host=socket.gethostname(),
        pid=os.getpid(),
        started_at=time.time(),
    )
