"""Children of `kunserve up` as real processes: kept running, ended in order, never left behind."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from benchmarks.processes import read_stat
from services.cluster.child import ChildSpec
from services.cluster.log_stream import LogStream
from services.cluster.restart import Backoff
from services.cluster.supervisor import ChildKeeper, NatsKeeper, Readiness, Supervisor
from shared.embedded_nats import EmbeddedNats
from shared.errors import ConfigError, KunserveError
from shared.logging import LogFormat
from tests.conftest import eventually

QUICK = Backoff(0.01, 0.05, healthy_seconds=60.0, first_attempts=3)
OBEDIENT = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
STUBBORN = (
    "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    " print(os.getpid(), flush=True); time.sleep(600)"
)
REFUSING = "import sys; print('kunserve worker: too small', file=sys.stderr); sys.exit(2)"
CRASHING = "raise SystemExit('out of luck')"
ORPHANING = f"""
import asyncio, io, sys
from services.cluster.child import Child, ChildSpec
from services.cluster.log_stream import LogStream
from shared.logging import LogFormat
async def main():
    spec = ChildSpec("worker-0", [sys.executable, "-c", {OBEDIENT!r}], {{}})
    await Child.start(spec, LogStream(sys.stdout, LogFormat.JSON, 8))
    await asyncio.sleep(600)
asyncio.run(main())
"""


class Bench:
    """A supervisor and what its children print."""

    def __init__(self) -> None:
        self.output = io.StringIO()
        self.readiness = Readiness()
        self.supervisor = Supervisor()

    def keep(self, name: str, program: str) -> None:
        spec = ChildSpec(name, [sys.executable, "-c", program], dict(os.environ))
        logs = LogStream(self.output, LogFormat.JSON, 8)
        self.supervisor.start(ChildKeeper(spec, logs, QUICK, self.readiness))

    @property
    def pids(self) -> list[int]:
        """The pids that children have printed, in order."""
        return [int(line) for line in self.output.getvalue().split()]


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    await bench.supervisor.kill()


def is_gone(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is None or stat.is_zombie


def running_pid(server: EmbeddedNats) -> int | None:
    try:
        return server.pid
    except KunserveError:
        return None


async def test_a_killed_child_is_started_again(bench: Bench) -> None:
    bench.keep("worker-0", OBEDIENT)
    await eventually(lambda: len(bench.pids) == 1)
    os.kill(bench.pids[0], signal.SIGKILL)
    await eventually(lambda: len(bench.pids) == 2)
    assert not is_gone(bench.pids[1])


async def test_a_stopped_child_has_ended_and_stays_so(bench: Bench) -> None:
    bench.keep("worker-0", OBEDIENT)
    await eventually(lambda: len(bench.pids) == 1)
    await bench.supervisor.stop(["worker-0"], grace_seconds=10.0)
    assert is_gone(bench.pids[0])


async def test_a_child_that_does_not_listen_is_killed_after_its_grace(bench: Bench) -> None:
    bench.keep("worker-0", STUBBORN)
    await eventually(lambda: len(bench.pids) == 1)
    await bench.supervisor.stop(["worker-0"], grace_seconds=0.1)
    assert is_gone(bench.pids[0])


async def test_a_child_that_waits_for_its_restart_can_be_stopped(bench: Bench) -> None:
    bench.readiness.was_ready = True
    bench.keep("worker-0", CRASHING)
    await eventually(lambda: "out of luck" in bench.output.getvalue())
    await bench.supervisor.stop(["worker-0"], grace_seconds=10.0)


async def test_kill_leaves_nobody(bench: Bench) -> None:
    for name in ("worker-0", "worker-1"):
        bench.keep(name, STUBBORN)
    await eventually(lambda: len(bench.pids) == 2)
    await bench.supervisor.kill()
    assert all(is_gone(pid) for pid in bench.pids)


async def test_a_refused_configuration_is_told_in_the_childs_words(bench: Bench) -> None:
    bench.keep("worker-0", REFUSING)
    with pytest.raises(ConfigError, match=r"^too small$"):
        await asyncio.wait_for(bench.supervisor.wait_for_fault(), 20)


async def test_a_child_that_never_works_is_given_up(bench: Bench) -> None:
    bench.keep("worker-0", CRASHING)
    with pytest.raises(KunserveError, match=r"worker-0 ended 3 times .* code 1: out of luck"):
        await asyncio.wait_for(bench.supervisor.wait_for_fault(), 20)


async def test_a_killed_nats_server_comes_back_with_its_store(tmp_path: Path) -> None:
    supervisor = Supervisor()
    server = EmbeddedNats(store_dir=tmp_path / "jetstream")
    await server.start()
    url, pid = server.url, server.pid
    supervisor.start(NatsKeeper(server, QUICK))
    try:
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: running_pid(server) not in (None, pid))
        assert server.url == url
        assert (tmp_path / "jetstream").exists()
        await supervisor.stop(["nats"], grace_seconds=10.0)
    finally:
        await supervisor.kill()
        await server.stop()


async def test_children_die_with_a_parent_that_is_killed() -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ORPHANING, stdout=asyncio.subprocess.PIPE
    )
    if parent.stdout is None:
        pytest.fail("no pipe")
    try:
        child = int(await asyncio.wait_for(parent.stdout.readline(), 20))
        assert not is_gone(child)
        parent.kill()
        await eventually(lambda: is_gone(child))
    finally:
        if parent.returncode is None:
            parent.kill()
        await parent.wait()
