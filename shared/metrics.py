"""Metrics of one process and the admin endpoints that show them.

Every process has a registry of its own (no global one). Handlers read what is cached and never
wait for the bus or the device, so a service in trouble still answers; only probes ask, with a
deadline.

    GET /live          the event loop turns
    GET /ready         200, or 503 with the reasons
    GET /metrics       Prometheus text
    GET /debug/state   what the service believes, as JSON
    GET /debug/NAME    what a part of it answers when it is asked, as JSON
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.bus.base import Bus
from shared.errors import ConfigError

#: Reasons why the service is not ready; empty where it is.
Readiness = Callable[[], Sequence[str]]
#: A JSON-serialisable picture of the service.
State = Callable[[], Mapping[str, Any]]
#: Asks a part of the service for a picture of itself; TimeoutError if it does not answer.
Probe = Callable[[], Awaitable[Mapping[str, Any]]]

SHUTDOWN_TIMEOUT_SECONDS = 1.0


def new_registry() -> CollectorRegistry:
    """A registry with the process's own figures (CPU, memory, files, garbage collection)."""
    registry = CollectorRegistry(auto_describe=True)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class BusCollector(Collector):
    """Shows `Bus.stats` and whether the bus is connected."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "kunserve_nats_connected",
            "1 while the connection to NATS is up",
            value=float(self._bus.is_connected),
        )
        stats = self._bus.stats
        for name, text, value in (
            ("disconnects", "connections to NATS that were lost", stats.disconnects),
            ("reconnects", "connections to NATS that were made again", stats.reconnects),
            ("errors", "errors that the NATS client reported", stats.errors),
            ("slow_consumers", "messages dropped since they came too fast", stats.slow_consumers),
            ("handler_errors", "messages whose handler failed", stats.handler_errors),
        ):
            yield CounterMetricFamily(f"kunserve_nats_{name}", text, value=float(value))


def render(registry: CollectorRegistry) -> web.Response:
    """The registry's metrics as a response."""
    return web.Response(
        body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
    )


def admin_app(
    registry: CollectorRegistry,
    readiness: Readiness,
    state: State,
    probes: Mapping[str, Probe] | None = None,
) -> web.Application:
    """The admin endpoints; each of `probes` is /debug/ and its name."""

    async def live(request: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def ready(request: web.Request) -> web.Response:
        reasons = list(readiness())
        return web.json_response(
            {"ready": not reasons, "reasons": reasons}, status=503 if reasons else 200
        )

    async def metrics(request: web.Request) -> web.Response:
        return render(registry)

    async def debug_state(request: web.Request) -> web.Response:
        return web.json_response(state())

    app = web.Application()
    app.router.add_get("/live", live)
    app.router.add_get("/ready", ready)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/debug/state", debug_state)
    for name, probe in (probes or {}).items():
        app.router.add_get(f"/debug/{name}", _probe_handler(name, probe))
    return app


def _probe_handler(name: str, probe: Probe) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        try:
            return web.json_response(await probe())
        except TimeoutError:
            reason = f"{name} does not answer: it is busy, or ended"
            return web.json_response({"error": reason}, status=503)

    return handle


class AdminServer:
    """Serves an admin app.

    Args:
        port: 0 takes a free one; see `port` after `start`.
    """

    def __init__(self, app: web.Application, host: str, port: int) -> None:
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_SECONDS
        )
        self._host = host
        self._port = port

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    async def start(self) -> None:
        """Listen; raises ConfigError where the address cannot be used."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError(
                f"cannot listen on {self._host}:{self._port} (--admin-host, --admin-port):"
                f" {error.strerror}"
            ) from error
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Listen no more."""
        await self._runner.cleanup()
