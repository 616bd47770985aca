"""The one thread that touches the device, and the way to it from the event loop.

    event loop                                engine thread
    ----------                                -------------
    submit(command)  --- SimpleQueue --->     apply commands, step while there is work
    links' threads   --- frames ------->
    on_report(...)   <-- call_soon_threadsafe ---  EngineReport before and after each step

The event loop never calls torch; the thread never awaits. Commands and frames are taken between
batches, so a cancelled request holds its KV for one step at most.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import structlog

from services.worker.build import BuiltEngine
from services.worker.channels.factory import ChannelFactory
from services.worker.core import EngineCore
from services.worker.engine.outputs import SchedulerLoad
from services.worker.engine.request import Request
from services.worker.facts import model_facts
from services.worker.identity import ModelFacts
from services.worker.inspection import EngineInspection
from services.worker.links.base import DownReason, Link, LinkFrame
from services.worker.meter import MeterReading
from services.worker.news import News
from services.worker.pipeline.events import GroupEvent
from services.worker.pipeline.member import GroupMember
from services.worker.pipeline.peers import GroupPeers
from services.worker.regrouping import Regrouping
from shared.messages import TokenItem

#: How long an idle thread sleeps before it looks at its stop flag.
_IDLE_SECONDS = 1.0
#: The same while KV waits for room on a link, layers are loaded, or the memory is to be tidied.
_BUSY_SECONDS = 0.001
#: The same while the device computes tokens that another worker waits for: little next to a batch,
#: and some percent of a core.
_ANSWER_SECONDS = 0.0002


@dataclass(frozen=True, slots=True)
class Add:
    """Queue a request."""

    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop a request."""

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no new requests."""


@dataclass(frozen=True, slots=True)
class PrepareLayout:
    """Get ready for a layout; links to the other members of a group are up."""

    regrouping: Regrouping
    peers: GroupPeers | None  # None: the worker shall serve alone


@dataclass(frozen=True, slots=True)
class AbandonLayout:
    """What was prepared will not be committed."""


@dataclass(frozen=True, slots=True)
class CommitLayout:
    """Serve as prepared from now on."""


@dataclass(frozen=True, slots=True)
class BreakUp:
    """Leave the group at once and become a replica."""

    reason: str


@dataclass(frozen=True, slots=True)
class FrameReceived:
    """A member of a group sent something."""

    frame: LinkFrame


@dataclass(frozen=True, slots=True)
class LinkDown:
    """A link to a member of a group is gone."""

    link: Link
    reason: DownReason


@dataclass(frozen=True, slots=True)
class Inspect:
    """Say what the engine holds."""

    reply: Future[EngineInspection]


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave the thread; unfinished requests are abandoned."""


LayoutCommand = PrepareLayout | AbandonLayout | CommitLayout | BreakUp
GroupCommand = LayoutCommand | FrameReceived | LinkDown
Command = Add | Cancel | Drain | Inspect | Stop | GroupCommand


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What one round of the thread brought, or a part of it.

    Attributes:
        items: new tokens and ends of requests; may be empty.
        load: the engine's load after the round.
        num_added: how many `Add` commands that load includes, counted from the start.
        reading: where the thread's time went.
        events: what happened to the worker's group; older than the items.
        facts: what the worker holds, where that has changed.
    """

    items: tuple[TokenItem, ...]
    load: SchedulerLoad
    num_added: int
    reading: MeterReading
    events: tuple[GroupEvent, ...] = ()
    facts: ModelFacts | None = None


class EngineThread:
    """Runs an EngineCore. Built, started once, stopped once."""

    def __init__(
        self,
        build: Callable[[], BuiltEngine],
        loop: asyncio.AbstractEventLoop,
        on_report: Callable[[EngineReport], None],
    ) -> None:
        """Prepare the thread.

        Args:
            build: loads the model, inside the thread.
            on_report: called on `loop` whenever there is news, as soon as it is known.
        """
        self._build = build
        self._loop = loop
        self._on_report = on_report
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._woke_at = time.monotonic()
        self._num_added = 0
        self._num_changes = 0  # of what the worker holds, as reported last
        #: Of the worker's memory, once it is loaded; see `MemoryPool.shareable_file`.
        self.memory_file: int | None = None
        self.channels: ChannelFactory  # once it is loaded, too
        self._ready: Future[ModelFacts] = Future()
        self._finished: Future[None] = Future()
        self._log = structlog.get_logger(component="engine")
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> asyncio.Future[ModelFacts]:
        """Start the thread; the future brings what was loaded, or why it could not be."""
        self._thread.start()
        return asyncio.wrap_future(self._ready, loop=self._loop)

    async def wait_finished(self) -> None:
        """Return when the thread has ended; raises the fault that ended it, if any."""
        await asyncio.shield(asyncio.wrap_future(self._finished, loop=self._loop))

    async def stop(self, timeout_seconds: float) -> None:
        """End the thread after its present step and give the model's memory back.

        A thread that does not end in time is left behind; it ends with the process.
        """
        self.submit(Stop())
        await asyncio.to_thread(self._thread.join, timeout_seconds)
        if self._thread.is_alive():
            self._log.error("the engine thread does not end", waited_seconds=timeout_seconds)

    async def inspect(self, timeout_seconds: float) -> EngineInspection:
        """What the engine holds between two batches; TimeoutError if it does not come to one."""
        reply: Future[EngineInspection] = Future()
        self.submit(Inspect(reply))
        async with asyncio.timeout(timeout_seconds):
            return await asyncio.wrap_future(reply)

    def submit(self, command: Command) -> None:
        """Hand over a command; applied before the next batch, in order."""
        self._commands.put(command)

    def _main(self) -> None:
        try:
            engine = self._build()
        except BaseException as error:  # handed to whoever waits for the model
            self._ready.set_exception(error)
            self._finished.set_result(None)
            return
        self.memory_file = engine.runner.pool.shareable_file
        self.channels = engine.channels
        self._ready.set_result(engine.facts)
        try:
            self._run(engine)
            engine.member.close()
            engine.runner.close()
        except BaseException as error:  # handed to the service, which ends the process
            self._finished.set_exception(error)
        else:
            self._finished.set_result(None)

    def _run(self, engine: BuiltEngine) -> None:
        core, member, activity = engine.core, engine.member, engine.runner.activity
        self._num_changes = engine.runner.num_changes
        self._report(engine, News())
        while True:
            commands = self._wait_for_commands(engine)
            if any(isinstance(command, Stop) for command in commands):
                return
            self._num_added += sum(isinstance(command, Add) for command in commands)
            news = News()
            for command in commands:
                news.add(_apply(core, member, command), member.take_events())
            news.add(member.pump(time.monotonic()), member.take_events())
            if news.has_items:  # what has come back must not wait for the next batch
                self._report(engine, news)
                news = News()
            news.add(core.step(time.monotonic()), member.take_events())
            activity.is_awaited = core.is_waiting and self._commands.empty()
            news.add(member.pump(time.monotonic()), member.take_events())
            if member.is_settled:
                engine.tidying.pump()
            activity.is_awaited = False
            if commands or not news.is_empty or engine.runner.num_changes != self._num_changes:
                self._report(engine, news)
            if member.is_grouped:
                engine.runner.meter.worked(time.monotonic() - self._woke_at)

    def _wait_for_commands(self, engine: BuiltEngine) -> list[Command]:
        began_at = time.monotonic()
        commands = self._take_commands(_wait_seconds(engine))
        self._woke_at = time.monotonic()
        engine.runner.note_progress()
        if engine.member.is_grouped:
            engine.runner.meter.waited(
                self._woke_at - began_at,
                leads_work=engine.core.has_work,
                is_computing=engine.runner.activity.is_running,
            )
        return commands

    def _take_commands(self, wait_seconds: float) -> list[Command]:
        commands: list[Command] = []
        try:
            if wait_seconds > 0.0:
                commands.append(self._commands.get(timeout=wait_seconds))
            while True:
                commands.append(self._commands.get_nowait())
        except queue.Empty:
            return commands

    def _report(self, engine: BuiltEngine, news: News) -> None:
        before, self._num_changes = self._num_changes, engine.runner.num_changes
        facts = model_facts(engine.runner) if self._num_changes != before else None
        load, reading = engine.core.load(), engine.runner.meter.read()
        for events, items in news.parts:
            report = EngineReport(
                items=tuple(items),
                load=load,
                num_added=self._num_added,
                reading=reading,
                events=tuple(events),
                facts=facts,
            )
            self._loop.call_soon_threadsafe(self._on_report, report)


def _wait_seconds(engine: BuiltEngine) -> float:
    """How long to sleep if nothing arrives; whatever arrives ends it."""
    if not engine.core.is_waiting:
        return 0.0
    if engine.member.owes_answers:
        return _ANSWER_SECONDS
    is_busy = engine.member.is_busy or (engine.member.is_settled and engine.tidying.is_due)
    return _BUSY_SECONDS if is_busy else _IDLE_SECONDS


def _apply(core: EngineCore, member: GroupMember, command: Command) -> list[TokenItem]:
    match command:
        case Add(request):
            return core.add(request)
        case Cancel(request_id, attempt):
            core.cancel(request_id, attempt)
        case FrameReceived(frame):
            return member.on_frame(frame, time.monotonic())
        case PrepareLayout(regrouping, peers):
            member.prepare(regrouping, peers)
        case AbandonLayout():
            member.abandon()
        case CommitLayout():
            member.commit()
        case LinkDown(link, reason):
            return member.on_down(link, reason)
        case BreakUp(why):
            return member.break_up(why)
        case Inspect(reply):
            if reply.set_running_or_notify_cancel():
                reply.set_result(member.inspect())
        case Drain():
            core.drain()
    return []
