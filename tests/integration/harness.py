"""Real clusters for tests: NATS, planner, router and workers, each a process of its own.

Single processes can be killed and started again; whatever happens in a test, nothing of a cluster
outlives it, and that is checked. Logs are under the cluster's directory, and shown when a process
does not start.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import pytest

from benchmarks.processes import ProcessIdentity, free_port, is_alive, process_tree
from shared.embedded_nats import EmbeddedNats
from shared.parent_death import dies_with_parent

REPOSITORY = Path(__file__).parents[2]
START_TIMEOUT_SECONDS = 120.0
STOP_TIMEOUT_SECONDS = 30.0
POLL_SECONDS = 0.02
#: Weights of the built-in model in fp32, and room for some hundred KV blocks.
WORKER_MEMORY = "640MiB"


class ServiceProcess:
    """One `kunserve` process; `log` has all it wrote, over every start."""

    def __init__(
        self, name: str, arguments: Sequence[str], environment: Mapping[str, str], directory: Path
    ) -> None:
        self.name = name
        self._arguments = list(arguments)
        self._environment = dict(environment)
        self._log_path = directory / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._family: set[ProcessIdentity] = set()

    def start(self) -> None:
        """Start it, again if it has ended."""
        command = [sys.executable, "-m", "services.cli", *self._arguments]
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                dies_with_parent(command, signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment},
                cwd=REPOSITORY,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """Everything it wrote."""
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def kill(self) -> None:
        """End it as a crash does, and wait until it is gone."""
        self._send(signal.SIGKILL)
        self._running().wait(STOP_TIMEOUT_SECONDS)

    def pause(self) -> None:
        """Let it hang: it keeps its connections and answers nothing."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    def terminate(self) -> None:
        """Ask it to end; returns at once."""
        self._send(signal.SIGTERM)

    async def wait(self, timeout_seconds: float = STOP_TIMEOUT_SECONDS) -> int:
        """Its exit code; fails the test where it does not end in time."""
        deadline = time.monotonic() + timeout_seconds
        while self.is_running:
            if time.monotonic() > deadline:
                pytest.fail(f"{self.name} still runs after {timeout_seconds:g} s:\n{self.log}")
            await asyncio.sleep(POLL_SECONDS)
        return self._running().returncode

    def remember_family(self) -> None:
        """Note which processes it has started so far, so that their end can be checked."""
        if self._process is not None:
            self._family |= process_tree(self._process.pid)

    def destroy(self) -> list[int]:
        """Kill it and all that it started; the pids of what had outlived it."""
        self.remember_family()
        was_running = self.is_running
        left = [member for member in self._family if is_alive(member)]
        for member in left:
            os.kill(member.pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait(STOP_TIMEOUT_SECONDS)
        return [] if was_running else [member.pid for member in left]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            pytest.fail(f"{self.name} was never started")
        return self._process

    def _send(self, number: signal.Signals) -> None:
        self.remember_family()
        self._running().send_signal(number)


class Cluster:
    """A cluster in `directory`; use it as an async context manager.

    Args:
        workers, routers, planners: how many to start.
        settings: environment variables of every process, like `{"KUNSERVE_MAX_NUM_SEQS": "4"}`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        workers: int = 2,
        routers: int = 1,
        planners: int = 1,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._directory = directory
        self._settings = dict(settings or {})
        self.nats = EmbeddedNats(store_dir=directory / "jetstream")
        self._counts = {"planner": planners, "router": routers, "worker": workers}
        self.planners: list[ServiceProcess] = []
        self.routers: list[ServiceProcess] = []
        self.workers: list[ServiceProcess] = []
        self.urls: list[str] = []

    @property
    def url(self) -> str:
        """Base URL of the first router, without /v1."""
        return self.urls[0]

    @property
    def processes(self) -> list[ServiceProcess]:
        return [*self.routers, *self.workers, *self.planners]

    def add_planner(self) -> ServiceProcess:
        return self._add("planner", self.planners)

    def add_router(self) -> ServiceProcess:
        port = free_port()
        self.urls.append(f"http://127.0.0.1:{port}")
        return self._add("router", self.routers, "--port", str(port))

    def add_worker(self) -> ServiceProcess:
        return self._add("worker", self.workers)

    async def cluster(self) -> Any:
        """What `GET /cluster` of the first router answers, None where nobody answers."""
        status, body = await self._get(f"{self.url}/cluster")
        return body if status == 200 else None

    async def ready_workers(self) -> set[str]:
        """Ids of the workers that `GET /cluster` calls ready."""
        cluster = await self.cluster()
        workers = cluster["workers"] if cluster else []
        return {worker["id"] for worker in workers if worker["state"] == "ready"}

    async def wait_ready(self, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
        """Return when every running worker is ready and routers answer health checks with yes."""
        wanted = {worker.name for worker in self.workers if worker.is_running}
        deadline = time.monotonic() + timeout_seconds
        while not (wanted <= await self.ready_workers() and await self._routers_are_healthy()):
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {process.name}\n{process.log}" for process in self.processes)
                pytest.fail(f"the cluster is not ready after {timeout_seconds:g} s\n{logs}")
            await asyncio.sleep(POLL_SECONDS)

    async def __aenter__(self) -> Self:
        try:
            await self.nats.start()
            for _ in range(self._counts["planner"]):
                self.add_planner()
            for _ in range(self._counts["router"]):
                self.add_router()
            for _ in range(self._counts["worker"]):
                self.add_worker()
            await self.wait_ready()
        except BaseException:
            self._destroy()
            await self.nats.stop()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        left = self._destroy()
        await self.nats.stop()
        if exc is None and left:
            pytest.fail(f"processes {left} outlived the service that started them")

    def _destroy(self) -> list[int]:
        return [pid for process in self.processes for pid in process.destroy()]

    def _add(self, service: str, group: list[ServiceProcess], *arguments: str) -> ServiceProcess:
        name = f"{service}-{len(group)}"
        environment = {
            "KUNSERVE_NATS": self.nats.url,
            "KUNSERVE_DEVICE_MEMORY": WORKER_MEMORY,
            "KUNSERVE_THREADS": "1",
            "KUNSERVE_LEASE_TTL_SECONDS": "2",
            **self._settings,
        }
        command = [service, f"--{service}-id", name, *arguments]
        process = ServiceProcess(name, command, environment, self._directory)
        group.append(process)
        process.start()
        return process

    async def _routers_are_healthy(self) -> bool:
        running = [
            url for url, router in zip(self.urls, self.routers, strict=True) if router.is_running
        ]
        answers = [await self._get(f"{url}/health") for url in running]
        return all(status == 200 for status, _ in answers)

    async def _get(self, url: str) -> tuple[int, Any]:
        """Status and JSON body, (0, None) where nobody answers."""
        timeout = aiohttp.ClientTimeout(total=5)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(url) as response,
            ):
                return response.status, await response.json()
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return 0, None


async def run_command(
    *arguments: str, environment: Mapping[str, str] | None = None, timeout_seconds: float = 60.0
) -> tuple[int, str, str]:
    """Run `kunserve ...` to its end: exit code, standard output, standard error.

    Fails the test where it does not end in time.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.cli",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )
    family = process_tree(process.pid)
    try:
        async with asyncio.timeout(timeout_seconds):
            output, errors = await process.communicate()
    except TimeoutError:
        pytest.fail(f"kunserve {' '.join(arguments)} hangs")
    finally:
        for member in family | process_tree(process.pid):
            if is_alive(member):
                os.kill(member.pid, signal.SIGKILL)
    return process.returncode or 0, output.decode(), errors.decode()
