"""Keeps the processes of a local cluster running, and ends them in order.

Supervisor --- Keeper router   --- Child (pid 12)
           +-- Keeper worker-0 --- Child (pid 13), ended --> back-off --> Child (pid 27)
           +-- NatsKeeper      --- EmbeddedNats
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from typing import Protocol

import structlog

from services.cluster.child import Child, ChildSpec
from services.cluster.log_stream import LogStream
from services.cluster.restart import Backoff, RestartPolicy, Verdict
from shared.embedded_nats import EmbeddedNats
from shared.errors import ConfigError, KunserveError

_KILL_DEADLINE_SECONDS = 5.0


class Readiness:
    """Whether the cluster has ever answered a health check with yes."""

    def __init__(self) -> None:
        self.was_ready = False


class Keeper(Protocol):
    """Keeps one process running."""

    @property
    def name(self) -> str:
        """How people call the process."""
        ...

    async def run(self) -> None:
        """Return after `stop`; raise KunserveError where the process cannot be kept running.

        Cancelled, it kills the process.
        """
        ...

    async def stop(self, grace_seconds: float) -> None:
        """End the process for good: ask, then kill."""
        ...


class ChildKeeper:
    """Runs a child, and again whenever it ends."""

    def __init__(
        self, spec: ChildSpec, logs: LogStream, backoff: Backoff, readiness: Readiness
    ) -> None:
        self._spec = spec
        self._logs = logs
        self._policy = RestartPolicy(backoff)
        self._readiness = readiness
        self._child: Child | None = None
        self._stopping = asyncio.Event()
        self._log = structlog.get_logger(service="up", child=spec.name)

    @property
    def name(self) -> str:
        return self._spec.name

    async def run(self) -> None:
        """See `Keeper`; raises ConfigError where the child refuses its configuration."""
        while not self._stopping.is_set():
            self._child = child = await Child.start(self._spec, self._logs)
            try:
                if self._stopping.is_set():
                    child.kill()
                exit_code = await child.wait()
            finally:
                child.kill()
                await child.wait()
            if not self._stopping.is_set():
                await self._back_off(child, exit_code)

    async def stop(self, grace_seconds: float) -> None:
        """See `Keeper`."""
        self._stopping.set()
        if self._child is not None:
            await self._child.stop(grace_seconds)

    async def _back_off(self, child: Child, exit_code: int) -> None:
        decision = self._policy.judge(
            exit_code, child.lived_seconds, cluster_was_ready=self._readiness.was_ready
        )
        if decision.verdict is Verdict.REFUSED:
            raise ConfigError(own_words(child.last_line))
        how = f"code {exit_code}" if exit_code >= 0 else f"signal {-exit_code}"
        if decision.verdict is Verdict.HOPELESS:
            raise KunserveError(
                f"{self.name} ended {self._policy.failures} times before the cluster was ready,"
                f" at last with {how}: {own_words(child.last_line)}"
            )
        self._log.warning(
            "up.child_ended",
            ended_with=how,
            lived_seconds=round(child.lived_seconds, 1),
            failures=self._policy.failures,
            restart_in_seconds=decision.delay_seconds,
        )
        await _pause(self._stopping, decision.delay_seconds)


class NatsKeeper:
    """Runs a private nats-server, and again on the same port and store whenever it ends."""

    def __init__(self, server: EmbeddedNats, backoff: Backoff) -> None:
        self._server = server
        self._policy = RestartPolicy(backoff)
        self._stopping = asyncio.Event()
        self._changing = asyncio.Lock()
        self._log = structlog.get_logger(service="up", child=self.name)

    @property
    def name(self) -> str:
        return "nats"

    async def run(self) -> None:
        """See `Keeper`; the server was started before, as the others need its URL."""
        loop = asyncio.get_running_loop()
        try:
            while not self._stopping.is_set():
                started_at = loop.time()
                await self._server.wait()
                while not self._stopping.is_set():
                    if await self._start_again(loop.time() - started_at):
                        break
        except asyncio.CancelledError:
            await self._server.kill()
            raise

    async def stop(self, grace_seconds: float) -> None:
        """See `Keeper`."""
        self._stopping.set()
        async with self._changing:
            await self._server.stop()

    async def _start_again(self, lived_seconds: float) -> bool:
        decision = self._policy.judge(1, lived_seconds, cluster_was_ready=True)
        self._log.warning("up.nats_ended", restart_in_seconds=decision.delay_seconds)
        await _pause(self._stopping, decision.delay_seconds)
        async with self._changing:
            if self._stopping.is_set():
                return False
            await self._server.stop()
            try:
                await self._server.start()
            except KunserveError as error:
                self._log.warning("up.nats_failed", error=str(error))
                return False
            return True


class Supervisor:
    """Owns the keepers' tasks."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._keepers: dict[str, Keeper] = {}

    def start(self, keeper: Keeper) -> None:
        """Begin to keep a process running."""
        self._keepers[keeper.name] = keeper
        self._tasks[keeper.name] = asyncio.create_task(keeper.run(), name=f"keep {keeper.name}")

    async def wait_for_fault(self) -> None:
        """Return only by raising what a keeper raised."""
        while True:
            done, _ = await asyncio.wait(self._tasks.values(), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            raise KunserveError("a process of the cluster is no longer watched")

    async def stop(self, names: Collection[str], grace_seconds: float) -> None:
        """End these processes, all at once, and wait until they have ended."""
        await asyncio.gather(*(self._keepers[name].stop(grace_seconds) for name in names))
        await asyncio.gather(*(self._tasks[name] for name in names))

    async def kill(self) -> None:
        """Kill every process that still runs. Idempotent."""
        running = {task for task in self._tasks.values() if not task.done()}
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=_KILL_DEADLINE_SECONDS)


def own_words(line: str) -> str:
    """A child's last line without the name of the command in front of it."""
    name, separator, sentence = line.partition(": ")
    return sentence if separator and name.startswith("kunserve ") else line or "it left no word"


async def _pause(stopping: asyncio.Event, seconds: float) -> None:
    """Sleep, but not into a stop."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stopping.wait(), seconds)
