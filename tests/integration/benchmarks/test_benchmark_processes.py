"""A managed process is waited for with a deadline and leaves nothing running, whatever it does."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

from benchmarks.processes import (
    ManagedProcess,
    ProcessIdentity,
    ServerError,
    cpu_seconds,
    free_port,
    is_alive,
    process_tree,
)

#: Starts a child in a session of its own, ignores SIGTERM, says so, and waits.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
wait = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", wait])
subprocess.Popen([sys.executable, "-c", wait], start_new_session=True)
print("up", flush=True)
time.sleep(600)
"""


def python(code: str, log: Path, grace_seconds: float = 10.0) -> ManagedProcess:
    return ManagedProcess(
        [sys.executable, "-c", code], log_path=log, stop_grace_seconds=grace_seconds
    )


def wait_for_text(log: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in log.read_text():
        assert time.monotonic() < deadline, f"no {text!r} in {log}"
        time.sleep(0.01)


async def test_nothing_is_left_of_a_family_that_ignores_sigterm(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with python(STUBBORN, log, grace_seconds=0.2) as process:
        await asyncio.to_thread(wait_for_text, log, "up")
        family: set[ProcessIdentity] = process_tree(process.pid)
        assert len(family) == 3
        assert all(is_alive(member) for member in family)
    assert not any(is_alive(member) for member in family)


async def test_a_server_is_ready_when_it_answers(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    async with ManagedProcess(command, log_path=tmp_path / "log") as process:
        waited = await process.wait_ready(f"http://127.0.0.1:{port}/", timeout_seconds=20)
        assert 0 <= waited < 20
        assert cpu_seconds(process.pid) >= 0


async def test_a_server_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    async with python("raise SystemExit('no such model')", tmp_path / "log") as process:
        with pytest.raises(ServerError, match=r"ended with code 1.*no such model"):
            await process.wait_ready("http://127.0.0.1:9/", timeout_seconds=20)


async def test_a_server_that_is_never_ready_hits_the_deadline(tmp_path: Path) -> None:
    async with python("import time; time.sleep(600)", tmp_path / "log") as process:
        with pytest.raises(ServerError, match="not ready within 0 s"):
            await process.wait_ready("http://127.0.0.1:9/", timeout_seconds=0.3)


async def test_a_command_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="cannot start"):
        async with ManagedProcess(["/no/such/command"], log_path=tmp_path / "log"):
            pass
