"""Real clusters for tests: NATS, planner, router and workers, each a process of its own.

Single processes can be killed and started again; whatever happens in a test, nothing of a cluster
outlives it, and that is checked. Logs are under the cluster's directory, and shown when a process
does not start.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import is_alive, process_tree
from shared.embedded_nats import EmbeddedNats
from tests.integration.fault_points import write_order
from tests.integration.service_process import (
    POLL_SECONDS,
    REPOSITORY,
    PortReservation,
    ServiceProcess,
)

START_TIMEOUT_SECONDS = 120.0
#: Weights of the built-in model in fp32, and room for some hundred KV blocks.
WORKER_MEMORY = "640MiB"


class Cluster:
    """A cluster in `directory`; use it as an async context manager.

    Args:
        workers, routers, planners: how many to start.
        settings: environment variables of every process, like `{"KUNSERVE_MAX_NUM_SEQS": "4"}`.
        has_fault_points: `signal_at` can be used.
    """

    def __init__(
        self,
        directory: Path,
        *,
        workers: int = 2,
        routers: int = 1,
        planners: int = 1,
        settings: Mapping[str, str] | None = None,
        has_fault_points: bool = False,
    ) -> None:
        self._directory = directory
        self._settings = dict(settings or {})
        self._has_fault_points = has_fault_points
        self._ports: list[PortReservation] = []
        self.nats = EmbeddedNats(port=self._reserve_port().port, store_dir=self._store_dir)
        self._counts = {"planner": planners, "router": routers, "worker": workers}
        self.planners: list[ServiceProcess] = []
        self.routers: list[ServiceProcess] = []
        self.workers: list[ServiceProcess] = []

    @property
    def url(self) -> str:
        """Base URL of the first router, without /v1."""
        return self.routers[0].url

    @property
    def router_port(self) -> int:
        """Port of the first router, for what no HTTP client would send."""
        return int(self.url.rpartition(":")[2])

    @property
    def urls(self) -> list[str]:
        """Base URLs of all routers."""
        return [router.url for router in self.routers]

    @property
    def processes(self) -> list[ServiceProcess]:
        return [*self.routers, *self.workers, *self.planners]

    def add_planner(self) -> ServiceProcess:
        return self._add("planner", self.planners, "--admin-port")

    def add_router(self) -> ServiceProcess:
        return self._add("router", self.routers, "--port")

    def add_worker(self) -> ServiceProcess:
        return self._add("worker", self.workers, "--admin-port")

    def signal_at(
        self, worker: ServiceProcess, state: str, pid: int, number: signal.Signals
    ) -> None:
        """Send a signal to process `pid` the moment `worker` enters `state`, once.

        Of several orders to one worker the last one counts. Its order dies with the worker.
        """
        write_order(self._order_path(worker.name), state, pid, number)

    def void_signals(self) -> None:
        """Forget orders to send a signal that were not carried out."""
        for worker in self.workers:
            self._order_path(worker.name).unlink(missing_ok=True)

    async def cluster(self, router: int = 0) -> Any:
        """What `GET /cluster` of a router answers, None where nobody answers."""
        status, body = await self._get(f"{self.routers[router].url}/cluster")
        return body if status == 200 else None

    async def ready_workers(self, router: int = 0) -> set[str]:
        """Ids of the workers that `GET /cluster` calls ready."""
        cluster = await self.cluster(router)
        workers = cluster["workers"] if cluster else []
        return {worker["id"] for worker in workers if worker["state"] == "ready"}

    async def state(self, process: ServiceProcess) -> Any:
        """What `GET /debug/state` of a worker or planner answers, None where nobody answers."""
        status, body = await self._get(f"{process.url}/debug/state")
        return body if status == 200 else None

    async def probe(self, process: ServiceProcess, name: str) -> Any:
        """What a part of a process answers when it is asked (`GET /debug/NAME`)."""
        status, body = await self._get(f"{process.url}/debug/{name}")
        assert status == 200, f"{process.name}: {body}"
        return body

    async def metric(
        self, process: ServiceProcess, name: str, labels: Mapping[str, str] | None = None
    ) -> float:
        """The sum of a metric of one process over all samples with `labels`; fails without any."""
        wanted = (labels or {}).items()
        async with aiohttp.ClientSession() as session, session.get(f"{process.url}/metrics") as r:
            families = text_string_to_metric_families(await r.text())
        values = [
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and wanted <= sample.labels.items()
        ]
        if not values:
            pytest.fail(f"{process.name} has no metric {name}")
        return sum(values)

    async def kv_blocks_used(self, router: int = 0) -> int:
        """KV blocks in use in all groups, as `GET /cluster` says."""
        cluster = await self.cluster(router)
        return sum(group["kv_blocks_used"] for group in cluster["groups"])

    async def wait_ready(self, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
        """Return when every running process calls itself ready, and routers see all the workers."""
        deadline = time.monotonic() + timeout_seconds
        while not await self._is_ready():
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {process.name}\n{process.log}" for process in self.processes)
                pytest.fail(f"the cluster is not ready after {timeout_seconds:g} s\n{logs}")
            await asyncio.sleep(POLL_SECONDS)

    async def repair(self) -> None:
        """Start what does not run, and return when everything is ready."""
        for process in self.processes:
            if not process.is_running:
                process.start()
        await self.wait_ready()

    def wipe_nats_store(self) -> None:
        """Have the next nats-server begin with nothing; the present one must be dead."""
        shutil.rmtree(self._store_dir)

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
        if exc is not None:
            return
        if left:
            pytest.fail(f"processes {left} outlived the service that started them")
        for process in self.processes:
            if "Traceback" in process.log:
                pytest.fail(f"{process.name} logged a traceback:\n{process.log}")

    def _order_path(self, worker: str) -> Path:
        return self._directory / f"{worker}.order"

    @property
    def _store_dir(self) -> Path:
        return self._directory / "jetstream"

    def _reserve_port(self) -> PortReservation:
        self._ports.append(PortReservation())
        return self._ports[-1]

    def _destroy(self) -> list[int]:
        left = [pid for process in self.processes for pid in process.destroy()]
        for port in self._ports:
            port.release()
        return left

    def _add(self, service: str, group: list[ServiceProcess], port_option: str) -> ServiceProcess:
        name = f"{service}-{len(group)}"
        reserved = self._reserve_port()
        environment = {
            "KUNSERVE_NATS": self.nats.url,
            "KUNSERVE_DEVICE_MEMORY": WORKER_MEMORY,
            "KUNSERVE_THREADS": "1",
            "KUNSERVE_LEASE_TTL_SECONDS": "2",
            "KUNSERVE_POLICY": "none",  # layouts change when a test says so
            **self._settings,
        }
        command = [service, f"--{service}-id", name, port_option, str(reserved.port)]
        program = ["services.cli"]
        if service == "worker" and self._has_fault_points:
            program = ["tests.integration.fault_points", str(self._order_path(name))]
        process = ServiceProcess(
            name, reserved.url, command, environment, self._directory, program=program
        )
        group.append(process)
        process.start()
        return process

    async def _is_ready(self) -> bool:
        running = [process for process in self.processes if process.is_running]
        for process in running:
            status, _ = await self._get(f"{process.url}/ready")
            if status != 200:
                return False
        workers = {worker.name for worker in self.workers if worker.is_running}
        for number, router in enumerate(self.routers):
            if router.is_running and not workers <= await self.ready_workers(number):
                return False
        return True

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
