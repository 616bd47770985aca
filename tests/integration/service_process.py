"""One `kunserve` process of a test cluster: start it, kill it, pause it, read its log."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks.processes import ProcessIdentity, is_alive, process_tree
from shared.parent_death import dies_with_parent

REPOSITORY = Path(__file__).parents[2]
STOP_TIMEOUT_SECONDS = 30.0
POLL_SECONDS = 0.02


class PortReservation:
    """A loopback port for one server, over every start of it.

    While the socket is bound, though nobody listens on it, nobody is given this port by chance; a
    server that names it may listen there (both say SO_REUSEADDR).
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def release(self) -> None:
        self._socket.close()


class ServiceProcess:
    """One `kunserve` process; `log` has all it wrote, over every start.

    `url` answers /live, /ready and /metrics; a router's answers everything else, too.
    """

    def __init__(
        self,
        name: str,
        url: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        directory: Path,
        *,
        program: Sequence[str] = ("services.cli",),
    ) -> None:
        """Take a process that is not started yet; `program` runs `kunserve` commands."""
        self._program = list(program)
        self.name = name
        self.url = url
        self._arguments = list(arguments)
        self._environment = dict(environment)
        self._log_path = directory / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._family: set[ProcessIdentity] = set()

    def start(self) -> None:
        """Start it, again if it has ended."""
        command = [sys.executable, "-m", *self._program, *self._arguments]
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
