"""`kunserve up`: a whole cluster on this machine, each service a child process.

check port -> model into the cache -> NATS -> planner, router, workers -> ready line
Ctrl-C: router drains -> workers -> planner -> NATS; a second Ctrl-C kills
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from services.cluster.child import ChildSpec
from services.cluster.greeting import greeting
from services.cluster.http import Answer, UnreachableError, ask
from services.cluster.log_stream import LogStream
from services.cluster.program import Program
from services.cluster.restart import Backoff
from services.cluster.settings import (
    LocalClusterSettings,
    UpSettings,
    child_environment,
    threads_per_worker,
)
from services.cluster.supervisor import ChildKeeper, NatsKeeper, Readiness, Supervisor
from services.worker.kernels.build import build_library, find_compiler
from shared.bus.nats import Credentials, connect
from shared.cache_dir import default_cache_dir
from shared.embedded_nats import EmbeddedNats, find_binary
from shared.errors import ConfigError, KunserveError
from shared.logging import configure_logging
from shared.models import ProgressReporter, resolve_model

_HEALTH_POLL_SECONDS = 0.1
_HEALTH_TIMEOUT_SECONDS = 2.0
_STOP_MARGIN_SECONDS = 10.0
_NATS_TIMEOUT_SECONDS = 3.0
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def run_up(settings: LocalClusterSettings) -> None:
    """Run a cluster until it is told to stop.

    Raises ConfigError for what cannot work, before anything is started where that can be seen,
    and KunserveError where a process cannot be kept running.
    """
    configure_logging("up", "up", settings.log_format, settings.log_level)
    port = claim_port(settings.host, settings.port)
    if settings.nats is None:
        find_binary(os.environ)
    prepare_cache(settings.model, settings.cache_dir or default_cache_dir(os.environ))
    with tempfile.TemporaryDirectory(prefix="kunserve-up-") as directory:
        asyncio.run(LocalCluster(settings, port, Path(directory)).run())


def claim_port(host: str, port: int) -> int:
    """The port the router shall listen on: `port`, or a free one for 0.

    Raises ConfigError where it is taken or the address is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
            claimed: int = probe.getsockname()[1]
            return claimed
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port or"
            " --host"
        ) from error


def prepare_cache(model: str, cache_dir: Path) -> None:
    """Convert the model and compile the kernels, side by side, once instead of in each worker."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        kernels = executor.submit(
            lambda: build_library(find_compiler(os.environ), cache_dir / "kernels")
        )
        resolve_model(model, cache_dir, ProgressReporter(sys.stderr, "Converting the model"))
        if not kernels.done():
            structlog.get_logger(service="up").info("up.compiling_kernels", cache=str(cache_dir))
        kernels.result()


class LocalCluster:
    """NATS, planner, router and workers, from start to end."""

    def __init__(self, settings: LocalClusterSettings, port: int, directory: Path) -> None:
        self._settings = settings
        self._port = port
        self._directory = directory
        self._workers = [f"worker-{index}" for index in range(settings.workers)]
        self._readiness = Readiness()
        self._backoff = Backoff()
        self._supervisor = Supervisor()
        width = max(len(name) for name in (*self._workers, "planner", "router"))
        self._logs = LogStream(sys.stderr, settings.log_format, width)
        self._log = structlog.get_logger(service="up")
        self._url = base_url(settings.host, port)

    async def run(self) -> None:
        """Start everything, keep it running until a signal, drain; a second signal kills."""
        stop, stop_at_once = asyncio.Event(), asyncio.Event()
        _listen_for_signals(stop, stop_at_once)
        try:
            await _first_to_end(self._live(stop), _cut_off(stop_at_once))
        finally:
            await self._supervisor.kill()

    async def _live(self, stop: asyncio.Event) -> None:
        nats_url = await self._nats()
        self._keep("planner", "planner", nats_url)
        self._keep("router", "router", nats_url, host=self._settings.host, port=self._port)
        threads = threads_per_worker(self._settings)
        for name in self._workers:
            self._keep("worker", name, nats_url, threads=threads)
        await _first_to_end(self._serve(stop), self._supervisor.wait_for_fault())
        await self._drain()

    async def _nats(self) -> str:
        """The URL of the server to use: one that answers."""
        settings = self._settings
        if settings.nats is None:
            server = EmbeddedNats(store_dir=self._directory / "jetstream")
            await server.start()
            self._supervisor.start(NatsKeeper(server, self._backoff))
            return server.url
        credentials = Credentials(settings.nats_creds, settings.nats_nkey)
        bus = await connect(
            settings.nats,
            service="up",
            instance="up",
            credentials=credentials,
            connect_timeout_seconds=_NATS_TIMEOUT_SECONDS,
        )
        await bus.close()
        return settings.nats

    def _keep(self, service: str, name: str, nats_url: str, **overrides: object) -> None:
        drain_timeout = self._settings.drain_timeout_seconds
        environment = child_environment(
            service,
            self._settings,
            {"nats": nats_url, "drain_timeout_seconds": drain_timeout, **overrides},
            os.environ,
        )
        spec = ChildSpec(name, service_command(service, f"--{service}-id", name), environment)
        self._supervisor.start(ChildKeeper(spec, self._logs, self._backoff, self._readiness))

    async def _serve(self, stop: asyncio.Event) -> None:
        """Say when the cluster can be used, then wait to be stopped."""
        deadline = self._settings.startup_timeout_seconds
        try:
            async with asyncio.timeout(deadline):
                while not stop.is_set() and not self._readiness.was_ready:
                    self._readiness.was_ready = await asyncio.to_thread(self._is_healthy)
                    await asyncio.sleep(_HEALTH_POLL_SECONDS)
        except TimeoutError as error:
            raise KunserveError(
                f"the cluster was not ready within {deadline:g} s; the log lines above say what"
                " it waits for, and --startup-timeout-seconds gives it longer"
            ) from error
        if self._readiness.was_ready:
            models = await asyncio.to_thread(self._ask, "/v1/models")
            sys.stdout.write(greeting(self._url, models.body, self._settings.workers))
            sys.stdout.flush()
        await stop.wait()

    async def _drain(self) -> None:
        self._log.info("up.draining", hint="Ctrl-C again stops at once")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.drain_timeout_seconds + _STOP_MARGIN_SECONDS
        stages = [["router"], self._workers, ["planner"]]
        if self._settings.nats is None:
            stages.append(["nats"])
        for names in stages:
            await self._supervisor.stop(names, max(1.0, deadline - loop.time()))
        self._log.info("up.stopped")

    def _is_healthy(self) -> bool:
        try:
            return self._ask("/health").status == 200
        except UnreachableError:
            return False

    def _ask(self, path: str) -> Answer:
        return ask(
            self._url + path, timeout_seconds=_HEALTH_TIMEOUT_SECONDS, bearer=self._settings.api_key
        )


def base_url(host: str, port: int) -> str:
    """Where a client on this machine finds a server that listens on `host`."""
    reachable = _ANY_ADDRESS.get(host, host)
    return f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{port}"


def service_command(service: str, *arguments: str) -> list[str]:
    """The command that runs a service in this very installation, whatever the directory holds."""
    return [sys.executable, "-P", "-m", "services.cli", service, *arguments]


def _listen_for_signals(stop: asyncio.Event, stop_at_once: asyncio.Event) -> None:
    def on_signal() -> None:
        (stop_at_once if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it on purpose
        loop.add_signal_handler(signal.SIGHUP, on_signal)


async def _cut_off(stop_at_once: asyncio.Event) -> None:
    await stop_at_once.wait()
    raise KunserveError("stopped at once; requests that were running are cut off")


async def _first_to_end(*coroutines: Coroutine[None, None, None]) -> None:
    """Run all until one ends, and cancel the others; raises what the one raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _run(settings: LocalClusterSettings, _: argparse.Namespace) -> int:
    run_up(settings)
    return 0


UP = Program(
    UpSettings,
    _run,
    "kunserve up\n"
    "  kunserve up --workers 3 --device-memory 2GiB --port 9000\n"
    "  kunserve up --model ./my-model --nats nats://127.0.0.1:4222",
)
