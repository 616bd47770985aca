"""How a service process starts, stops and fails.

kunserve <service>
  run_service(name, main)             exit code 0, 1 or 2; one sentence on stderr
    main:  stop = stop_on_signals()   SIGTERM or Ctrl-C asks, a second one ends at once
           async with BackgroundTasks() as tasks:
               tasks.spawn(...)       a task that crashes ends the service
               await tasks.run_until(stop)
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

import structlog

from shared.bus.base import Bus
from shared.errors import ConfigError, KunserveError

T = TypeVar("T")

EXIT_CLEAN, EXIT_FAULT, EXIT_CONFIG = 0, 1, 2
#: What cancelled background tasks get to clean up.
CANCEL_TIMEOUT_SECONDS = 5.0


def run_service(name: str, main: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Run `main` to its end and return the exit code of the process.

    A KunserveError becomes one sentence on stderr and exit code 1, a ConfigError exit code 2. Any
    other exception is a defect: its traceback goes to the log.
    """
    try:
        asyncio.run(main())
    except ConfigError as error:
        sys.stderr.write(f"kunserve {name}: {error}\n")
        return EXIT_CONFIG
    except KunserveError as error:
        sys.stderr.write(f"kunserve {name}: {error}\n")
        return EXIT_FAULT
    except KeyboardInterrupt:
        return EXIT_FAULT
    except Exception as error:
        structlog.get_logger(service=name).exception("service.crashed")
        sys.stderr.write(f"kunserve {name}: internal error: {error!r}\n")
        return EXIT_FAULT
    return EXIT_CLEAN


def stop_on_signals() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets; the second such signal ends the process at once."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(EXIT_FAULT)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop


async def unless_stopped(stop: asyncio.Event, coroutine: Coroutine[Any, Any, T]) -> T | None:
    """What `coroutine` returns; None, and it is cancelled, if `stop` is set before."""
    work = asyncio.create_task(coroutine)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else None
    finally:
        for task in (work, stopped):
            task.cancel()
        await asyncio.gather(work, stopped, return_exceptions=True)


async def fail_when_closed(bus: Bus) -> None:
    """A background task: end the service when the bus is closed for good under it."""
    await bus.wait_closed()
    raise KunserveError("the NATS server closed the connection for good")


class BackgroundTasks:
    """Owns the tasks of a service.

    The first one that raises ends `run_until` with its exception; leaving the context cancels the
    rest and waits for them. A task that returns has merely done its work.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._log = structlog.get_logger(component="lifecycle")

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run `coroutine` until it ends or the context is left."""
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    async def run_until(self, stop: asyncio.Event) -> None:
        """Return when `stop` is set; raise what a task raised, where one does before."""
        stopped = asyncio.create_task(stop.wait(), name="wait for stop")
        try:
            awaited: set[asyncio.Future[Any]] = {stopped, self._failure}
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        if self._failure.done():
            self._failure.result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        running = set(self._tasks)
        for task in running:
            task.cancel()
        if running:
            _, stuck = await asyncio.wait(running, timeout=CANCEL_TIMEOUT_SECONDS)
            for task in stuck:
                self._log.error("lifecycle.task_does_not_end", task=task.get_name())
        if self._failure.done():
            self._failure.exception()  # told by run_until, or logged

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return
        self._log.error("lifecycle.task_failed", task=task.get_name(), error=repr(error))
        if not self._failure.done():
            self._failure.set_exception(error)
