"""Start a server for a measurement, wait until it is ready, and leave nothing of it running."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import aiohttp

from shared.errors import KunserveError
from shared.parent_death import dies_with_parent

_POLL_SECONDS = 0.05
_KILL_SECONDS = 30.0  # a killed process ends when its last system call does


class ServerError(KunserveError):
    """A server under test did not start, or died."""


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process told apart from a later one that gets the same id."""

    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """What is used of /proc/<pid>/stat."""

    parent_pid: int
    session_id: int
    cpu_ticks: int
    start_ticks: int
    is_zombie: bool


def parse_stat(text: str) -> ProcessStat:
    """Parse /proc/<pid>/stat; the command name, in parentheses, may itself hold anything."""
    fields = text[text.rindex(")") + 2 :].split()
    return ProcessStat(
        parent_pid=int(fields[1]),
        session_id=int(fields[3]),
        cpu_ticks=int(fields[11]) + int(fields[12]),
        start_ticks=int(fields[19]),
        is_zombie=fields[0] == "Z",
    )


def read_stat(pid: int) -> ProcessStat | None:
    """The process's state, or None where it is gone."""
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return None


def cpu_seconds(pid: int) -> float:
    """CPU time that a process (all its threads) has used; raises ServerError if it is gone."""
    stat = read_stat(pid)
    if stat is None:
        raise ServerError(f"process {pid} is gone")
    return stat.cpu_ticks / os.sysconf("SC_CLK_TCK")


def process_tree(root_pid: int) -> set[ProcessIdentity]:
    """The process, its descendants, and the session it leads: orphans keep their session."""
    stats = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := read_stat(int(entry.name))) is not None:
            stats[int(entry.name)] = stat
    tree = {pid for pid, stat in stats.items() if root_pid in (pid, stat.session_id)}
    frontier = set(tree)
    while frontier:
        frontier = {pid for pid, stat in stats.items() if stat.parent_pid in frontier} - tree
        tree |= frontier
    return {ProcessIdentity(pid, stats[pid].start_ticks) for pid in tree}


def is_alive(process: ProcessIdentity) -> bool:
    """True while this very process runs (a zombie no longer does)."""
    stat = read_stat(process.pid)
    return stat is not None and stat.start_ticks == process.start_ticks and not stat.is_zombie


def free_port() -> int:
    """A loopback TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ManagedProcess:
    """A command and everything it starts; use as `async with ManagedProcess(...) as process`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        stop_grace_seconds: float = 20.0,
    ) -> None:
        self._command = list(command)
        self._log_path = log_path
        self._environment = {**os.environ, **(environment or {})}
        self._stop_grace_seconds = stop_grace_seconds
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.which(self._command[0]) is None:
            raise ServerError(f"cannot start {self._command[0]}: there is no such program")
        with self._log_path.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *dies_with_parent(self._command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def pid(self) -> int:
        """Process id; raises ServerError before the start."""
        if self._process is None:
            raise ServerError(f"{self._command[0]} was not started")
        return self._process.pid

    async def stop(self) -> None:
        """Ask the process to end, then kill what is left of it and of its descendants."""
        if self._process is None:
            return
        family = process_tree(self._process.pid)
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):  # what outlives its grace is killed below
                await asyncio.wait_for(self._process.wait(), self._stop_grace_seconds)
        family |= process_tree(self._process.pid)
        for member in family:
            if is_alive(member):
                os.kill(member.pid, signal.SIGKILL)
        await self._process.wait()
        async with asyncio.timeout(_KILL_SECONDS):
            while any(map(is_alive, family)):  # noqa: ASYNC110 - these are not our own children
                await asyncio.sleep(_POLL_SECONDS)

    async def wait_ready(self, url: str, *, timeout_seconds: float) -> float:
        """Poll `url` until it answers 200; returns the seconds waited.

        Raises ServerError where the process ends or the deadline passes first.
        """
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while (waited := loop.time() - started_at) < timeout_seconds:
                self.check_running()
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(url) as response:
                        if response.status == 200:
                            return waited
                await asyncio.sleep(_POLL_SECONDS)
        raise ServerError(f"{url} was not ready within {timeout_seconds:.0f} s; {self._log_hint()}")

    def check_running(self) -> None:
        """Raise ServerError if the process has ended."""
        if self._process is None or self._process.returncode is not None:
            code = None if self._process is None else self._process.returncode
            raise ServerError(f"{self._command[0]} ended with code {code}; {self._log_hint()}")

    def _log_hint(self) -> str:
        lines = self._log_path.read_text(errors="replace").splitlines()
        return f"its log is {self._log_path}, which ends with: {' / '.join(lines[-3:])}"
