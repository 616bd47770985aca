"""How services end: exit codes, one sentence on stderr, crashed tasks, signals."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest

from shared.bus.memory import MemoryBus, MemoryServer
from shared.errors import ConfigError, KunserveError
from shared.lifecycle import (
    BackgroundTasks,
    fail_when_closed,
    run_service,
    stop_on_signals,
    unless_stopped,
)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (KunserveError("it broke"), 1, "kunserve planner: it broke\n"),
        (ConfigError("it cannot work"), 2, "kunserve planner: it cannot work\n"),
    ],
)
def test_exit_codes(
    error: Exception | None, code: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        if error is not None:
            raise error

    assert run_service("planner", main) == code
    assert capfd.readouterr().err == said


def test_a_defect_is_told_in_one_sentence_and_logged(capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        raise ZeroDivisionError("oops")

    assert run_service("planner", main) == 1
    assert capfd.readouterr().err.endswith("internal error: ZeroDivisionError('oops')\n")


async def test_a_crashed_task_ends_the_service() -> None:
    others_cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            others_cancelled.set()

    async def crash() -> None:
        raise KunserveError("the engine died")

    async def service() -> None:
        async with BackgroundTasks() as tasks:
            tasks.spawn(work(), "work")
            tasks.spawn(crash(), "crash")
            await tasks.run_until(asyncio.Event())

    async with asyncio.timeout(5):
        with pytest.raises(KunserveError, match="the engine died"):
            await service()
    assert others_cancelled.is_set()


async def test_a_task_that_returns_ends_nothing_and_stop_ends_all() -> None:
    stop, returned, cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def once() -> None:
        returned.set()

    async def for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with asyncio.timeout(5), BackgroundTasks() as tasks:
        tasks.spawn(once(), "once")
        tasks.spawn(for_ever(), "for ever")
        running = asyncio.create_task(tasks.run_until(stop))
        await returned.wait()
        await asyncio.sleep(0)
        assert not running.done()
        stop.set()
        await running
    assert cancelled.is_set()


async def test_a_bus_closed_under_a_service_ends_it() -> None:
    bus = MemoryBus(MemoryServer(clock=lambda: 0.0), "a")
    guard = asyncio.create_task(fail_when_closed(bus))
    await bus.close()
    with pytest.raises(KunserveError, match="closed"):
        await asyncio.wait_for(guard, 5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_asks_to_stop(number: signal.Signals) -> None:
    stop = stop_on_signals()
    try:
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stop.wait(), 5)
    finally:
        for handled in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(handled)


SLOW_SERVICE = """
import asyncio, sys
from shared.lifecycle import run_service, stop_on_signals

async def main():
    stop = stop_on_signals()
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    await stop.wait()
    sys.stdout.write("draining\\n")
    sys.stdout.flush()
    await asyncio.sleep(60)

sys.exit(run_service("slow", main))
"""


async def test_the_second_signal_ends_the_process_at_once() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SLOW_SERVICE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(20):
        try:
            assert await process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGTERM)
            assert await process.stdout.readline() == b"draining\n"
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 1
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def test_work_that_ends_before_the_stop_gives_its_result() -> None:
    async def work() -> int:
        return 7

    assert await unless_stopped(asyncio.Event(), work()) == 7


async def test_work_that_fails_before_the_stop_raises() -> None:
    async def work() -> int:
        raise ConfigError("it cannot work")

    with pytest.raises(ConfigError):
        await unless_stopped(asyncio.Event(), work())


async def test_a_stop_cancels_the_work() -> None:
    stop, cancelled = asyncio.Event(), asyncio.Event()

    async def work() -> int:
        stop.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return 7

    assert await unless_stopped(stop, work()) is None
    assert cancelled.is_set()
