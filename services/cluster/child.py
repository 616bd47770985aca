"""One child process of `kunserve up`: started, watched, ended, and never left behind.

The child leads a session of its own, so that Ctrl-C in a terminal reaches `up` alone, which then
ends its children in order. Linux kills it when `up` dies, however that happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.cluster.log_stream import LogPump, LogStream
from shared.errors import KunserveError
from shared.parent_death import dies_with_parent

_OUTPUT_DEADLINE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run; `environment` is the whole environment, which may hold secrets."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(repr=False)


class Child:
    """A running process made from a `ChildSpec`."""

    def __init__(
        self, process: asyncio.subprocess.Process, pump: LogPump, copying: asyncio.Task[None]
    ) -> None:
        self._process = process
        self._pump = pump
        self._copying = copying
        self._started_at = time.monotonic()

    @classmethod
    async def start(cls, spec: ChildSpec, logs: LogStream) -> Child:
        """Start the process; raises KunserveError where the system refuses."""
        try:
            process = await asyncio.create_subprocess_exec(
                *dies_with_parent(spec.command, signal.SIGKILL),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=dict(spec.environment),
                start_new_session=True,
            )
        except OSError as error:
            raise KunserveError(f"cannot start {spec.command[0]}: {error.strerror}") from error
        pump = LogPump(spec.name, logs)
        output = process.stdout
        if output is None:
            raise KunserveError(f"{spec.name} has no output pipe")
        return cls(process, pump, asyncio.create_task(pump.run(output), name=f"log {spec.name}"))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    @property
    def lived_seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._started_at

    @property
    def last_line(self) -> str:
        """The last line it wrote that is not blank."""
        return self._pump.last_line

    async def wait(self) -> int:
        """Wait for its end and its last output; the exit code, or minus the signal's number."""
        code = await self._process.wait()
        # A grandchild may hold the pipe open; its words are not worth waiting for.
        await asyncio.wait({self._copying}, timeout=_OUTPUT_DEADLINE_SECONDS)
        if not self._copying.done():
            self._copying.cancel()
        elif not self._copying.cancelled():
            self._copying.result()  # a copy that failed is this program's fault: say so
        return code

    async def stop(self, grace_seconds: float) -> None:
        """Ask it to end, and kill it when the grace is over. Idempotent."""
        if self.is_running:
            self._process.terminate()
            try:
                async with asyncio.timeout(grace_seconds):
                    await self._process.wait()
            except TimeoutError:
                self.kill()
        await self.wait()

    def kill(self) -> None:
        """Kill it and its session at once. Idempotent."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):  # it ended this very moment
                os.killpg(self._process.pid, signal.SIGKILL)
