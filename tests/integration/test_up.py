"""`kunserve up` from the user's side: ready line, answers, drain, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from benchmarks.processes import ProcessIdentity, is_alive, process_tree
from tests.conftest import eventually
from tests.integration.harness import START_TIMEOUT_SECONDS, WORKER_MEMORY
from tests.integration.service_process import REPOSITORY

STOP_TIMEOUT_SECONDS = 60.0


class Up:
    """A running `kunserve up`."""

    def __init__(self, process: asyncio.subprocess.Process, log_path: Path) -> None:
        self.process = process
        self._log_path = log_path
        self.url = ""
        self.family: set[ProcessIdentity] = set()

    @property
    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    async def wait_ready(self) -> None:
        """Return when it has said that it serves."""

        def serves() -> bool:
            assert self.process.returncode is None, self.log
            match = re.search(r"serves smollm2 with .* at (http://\S+)/v1\n", self.log)
            self.url = match[1] if match else ""
            return bool(match)

        await eventually(serves, START_TIMEOUT_SECONDS)
        self.family = process_tree(self.process.pid)

    async def wait(self) -> int:
        return await asyncio.wait_for(self.process.wait(), STOP_TIMEOUT_SECONDS)

    def children(self, words: str) -> list[int]:
        """Pids of the processes below `up` whose command line holds `words`."""
        return [
            member.pid
            for member in process_tree(self.process.pid)
            if words in _command_line(member.pid)
        ]

    def living(self) -> list[str]:
        """Command lines of what still runs of all it has ever started."""
        return [_command_line(member.pid) for member in self.family if is_alive(member)]


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest_asyncio.fixture
async def up(tmp_path: Path) -> AsyncIterator[Up]:
    """A cluster of one worker on a free port."""
    log_path = tmp_path / "log"
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.cli", "up", "--port", "0", "--workers", "1"),
            *("--device-memory", WORKER_MEMORY),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=REPOSITORY,
            start_new_session=True,
        )
    running = Up(process, log_path)
    try:
        await running.wait_ready()
        yield running
    finally:
        for member in running.family | process_tree(process.pid):
            if is_alive(member):
                os.kill(member.pid, signal.SIGKILL)
        await process.wait()


def completion(max_tokens: int) -> dict[str, object]:
    return {
        "model": "smollm2",
        "prompt": "Once upon a time",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


async def complete(up: Up, max_tokens: int) -> dict[str, object]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{up.url}/v1/completions", json=completion(max_tokens)) as response,
    ):
        assert response.status == 200, await response.text()
        answer: dict[str, object] = await response.json()
        return answer


async def requests_running(up: Up) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"{up.url}/cluster") as response:
        cluster = await response.json()
        return sum(group["requests_running"] for group in cluster["groups"])


async def test_ctrl_c_lets_running_requests_finish(up: Up) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{up.url}/v1/completions", json=completion(64) | {"stream": True}
        ) as response,
    ):
        first = await response.content.readline()
        assert first.startswith(b"data: ")
        up.process.send_signal(signal.SIGINT)
        rest = await asyncio.wait_for(response.content.read(), STOP_TIMEOUT_SECONDS)
    assert b'"finish_reason":"length"' in rest
    assert rest.rstrip().endswith(b"[DONE]")
    assert await up.wait() == 0, up.log
    assert up.living() == []


async def test_a_second_ctrl_c_ends_it_at_once(up: Up) -> None:
    answer = asyncio.create_task(complete(up, 1200))
    await eventually(lambda: requests_running(up))
    up.process.send_signal(signal.SIGINT)
    await eventually(lambda: "up.draining" in up.log)
    up.process.send_signal(signal.SIGINT)
    assert await up.wait() == 1
    assert up.living() == []
    with pytest.raises((aiohttp.ClientError, AssertionError)):
        await answer


async def test_kill_9_leaves_no_process_behind(up: Up) -> None:
    up.process.kill()
    await up.wait()
    await eventually(lambda: up.living() == [])


async def test_killed_children_come_back_and_serve(up: Up) -> None:
    before = await complete(up, 8)
    for words in ("services.cli router", "services.cli worker", "services.cli planner"):
        (pid,) = up.children(words)
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda words=words, pid=pid: up.children(words) not in ([], [pid]))

    async def answers_again() -> bool:
        try:
            return (await complete(up, 8))["choices"] == before["choices"]
        except (aiohttp.ClientError, AssertionError):
            return False

    await eventually(answers_again, START_TIMEOUT_SECONDS)


async def test_a_killed_nats_comes_back_and_serves(up: Up) -> None:
    (pid,) = up.children("nats-server")
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: up.children("nats-server") not in ([], [pid]))
    answer = await asyncio.wait_for(complete(up, 8), STOP_TIMEOUT_SECONDS)
    assert "choices" in answer
