"""`kunserve doctor`: can this machine run KunServe, and if not, what is missing?

Each check looks at one thing and says what it found; none changes anything but a probe file in the
cache directory. The command fails if a check fails; a warning is worth knowing and no more.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field

from services.cluster.checks import Check, Finding
from services.cluster.gpu_checks import check_gpu
from services.cluster.program import Program
from services.cluster.table import render_bytes, render_table
from services.worker.kernels.build import find_compiler
from shared.bus.nats import Credentials, connect
from shared.cache_dir import default_cache_dir
from shared.embedded_nats import find_binary
from shared.errors import KunserveError
from shared.settings import ByteSize, Settings

GIB = 1024**3
MIN_NATS_VERSION = (2, 11)  # keys that expire one by one, on which leases rest
MIN_MAX_PAYLOAD_BYTES = 1024**2
NATS_TIMEOUT_SECONDS = 3.0


class DoctorSettings(Settings):
    """What the cluster that is to run here will need."""

    nats: str | None = Field(
        default=None, description="NATS server to check (default: the one that `up` would start)"
    )
    nats_creds: Path | None = Field(default=None, description="NATS credentials file")
    nats_nkey: Path | None = Field(default=None, description="file with a NATS nkey seed")
    cache_dir: Path | None = Field(default=None, description="where converted models are kept")
    workers: int = Field(default=2, ge=1, description="workers that shall run here")
    device_memory: ByteSize = Field(default=GIB, ge=1, description="budget of each worker")


def check_python() -> Iterable[Check]:
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    yield Check("Python", Finding.OK if good else Finding.FAILED, f"{version}, {sys.executable}")


def check_packages() -> Iterable[Check]:
    """The packages of this installation, and those that only workers need."""
    for package, needed_by in (
        ("aiohttp", "router"),
        ("nats-py", "every service"),
        ("pydantic", "every service"),
        ("tokenizers", "router"),
        ("safetensors", "worker"),
        ("torch", "worker"),
        ("transformers", "worker"),
    ):
        try:
            yield Check(package, Finding.OK, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            is_optional = needed_by == "worker"
            finding = Finding.WARNING if is_optional else Finding.FAILED
            yield Check(package, finding, f"not installed; {needed_by} needs it")


def check_cpu(cpuinfo: str) -> Iterable[Check]:
    """`cpuinfo` is the text of /proc/cpuinfo."""
    lines = [line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))]
    flags = set(lines[0].partition(":")[2].split()) if lines else set()
    wide = [flag for flag in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    cores = len(os.sched_getaffinity(0))
    detail = f"{cores} cores, {platform.machine()}, {' '.join(wide) or 'no wide vectors'}"
    is_slow = platform.machine() == "x86_64" and "avx2" not in flags
    yield Check("CPU", Finding.WARNING if is_slow else Finding.OK, detail)


def check_compiler() -> Iterable[Check]:
    try:
        compiler = find_compiler(os.environ)
        version = compiler.version().splitlines()[0]
    except (KunserveError, IndexError) as error:
        yield Check("C compiler", Finding.FAILED, str(error))
    else:
        yield Check("C compiler", Finding.OK, version)


def check_memory(meminfo: str, wanted_bytes: int) -> Iterable[Check]:
    """`meminfo` is the text of /proc/meminfo."""
    fields = dict(line.split(":", maxsplit=1) for line in meminfo.splitlines() if ":" in line)
    available_bytes = int(fields["MemAvailable"].split()[0]) * 1024
    finding = Finding.OK if available_bytes >= wanted_bytes else Finding.WARNING
    detail = f"{render_bytes(available_bytes)} free, {render_bytes(wanted_bytes)} wanted by workers"
    yield Check("memory", finding, detail)


def check_cache(directory: Path) -> Iterable[Check]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"x")
        free_bytes = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
    except OSError as error:
        yield Check("cache", Finding.FAILED, f"cannot write to {directory}: {error.strerror}")
    else:
        finding = Finding.OK if free_bytes >= GIB else Finding.WARNING
        yield Check("cache", finding, f"{directory}, {render_bytes(free_bytes)} free")


def check_nats(settings: DoctorSettings) -> Iterable[Check]:
    if settings.nats is None:
        try:
            yield Check("nats-server", Finding.OK, str(find_binary(os.environ)))
        except KunserveError as error:
            yield Check("nats-server", Finding.FAILED, str(error))
        return
    credentials = Credentials(settings.nats_creds, settings.nats_nkey)
    try:
        info = asyncio.run(_inspect_nats(settings.nats, credentials))
    except KunserveError as error:
        yield Check("NATS", Finding.FAILED, str(error))
    else:
        yield from judge_nats(info)


def judge_nats(info: dict[str, object]) -> Iterable[Check]:
    """`info` is what a NATS server says of itself in its INFO line."""
    version = str(info.get("version", "0"))
    numbers = tuple(int(part) for part in version.split("-")[0].split(".")[:2])
    is_new = numbers >= MIN_NATS_VERSION
    yield Check("NATS", Finding.OK if is_new else Finding.FAILED, f"version {version}")
    has_jetstream = info.get("jetstream") is True
    yield Check(
        "JetStream",
        Finding.OK if has_jetstream else Finding.FAILED,
        "on" if has_jetstream else "off; start nats-server with -js",
    )
    max_payload = info.get("max_payload")
    limit = max_payload if isinstance(max_payload, int) else 0
    finding = Finding.OK if limit >= MIN_MAX_PAYLOAD_BYTES else Finding.WARNING
    yield Check("max_payload", finding, f"{render_bytes(limit)}; it bounds a prompt")


async def _inspect_nats(url: str, credentials: Credentials) -> dict[str, object]:
    """Log in as a service does, then read how the server introduces itself."""
    bus = await connect(
        url,
        service="doctor",
        instance="doctor",
        credentials=credentials,
        connect_timeout_seconds=NATS_TIMEOUT_SECONDS,
    )
    await bus.close()
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 4222)
    try:
        with socket.create_connection(address, timeout=NATS_TIMEOUT_SECONDS) as connection:
            line = connection.makefile("rb").readline()
        info: dict[str, object] = json.loads(line.removeprefix(b"INFO "))
    except (OSError, ValueError) as error:
        raise KunserveError(f"NATS at {address[0]}:{address[1]} does not say INFO") from error
    return info


def _checks(settings: DoctorSettings) -> list[Callable[[], Iterable[Check]]]:
    wanted_bytes = settings.workers * settings.device_memory
    return [
        check_python,
        check_packages,
        lambda: check_cpu(Path("/proc/cpuinfo").read_text(encoding="utf-8")),
        check_compiler,
        check_gpu,
        lambda: check_memory(Path("/proc/meminfo").read_text(encoding="utf-8"), wanted_bytes),
        lambda: check_cache(settings.cache_dir or default_cache_dir(os.environ)),
        lambda: check_nats(settings),
    ]


def _run(settings: DoctorSettings, _: argparse.Namespace) -> int:
    results = [result for check in _checks(settings) for result in check()]
    rows = [(result.subject, result.finding.value, result.detail) for result in results]
    sys.stdout.write(render_table(("CHECK", "RESULT", "DETAIL"), rows))
    return 1 if any(result.finding is Finding.FAILED for result in results) else 0


DOCTOR = Program(
    DoctorSettings,
    _run,
    "kunserve doctor\n  kunserve doctor --nats nats://user:password@nats.example:4222",
)
