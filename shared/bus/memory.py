"""A NATS server inside one process: the twin of `NatsBus` for unit tests and simulations.

`MemoryServer` is the server, `MemoryBus` one client's connection. Same semantics as NATS: queue
groups, wildcards, no-responders, buffering while disconnected, buckets with revisions, compare-and-
set, leases. The clock is injected, so leases expire when a test says so.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Awaitable, Callable

import structlog

from shared.bus.base import (
    BusDisconnectedError,
    BusError,
    BusMessage,
    BusStats,
    BusTimeoutError,
    KeyValueEntry,
    MessageHandler,
    NoRespondersError,
    PayloadTooLargeError,
    ReconnectHandler,
    Subscription,
)
from shared.bus.memory_kv import Bucket, MemoryKeyValue, StoredValue
from shared.bus.watch import WatchFeed

MAX_PAYLOAD_BYTES = 8 * 1024 * 1024
PENDING_BYTES = 8 * 1024 * 1024


def subject_matches(pattern: str, subject: str) -> bool:
    """NATS wildcards: `*` is one token, a final `>` one or more."""
    patterns, tokens = pattern.split("."), subject.split(".")
    for index, token in enumerate(patterns):
        if token == ">":
            return len(tokens) > index
        if index >= len(tokens) or token not in ("*", tokens[index]):
            return False
    return len(patterns) == len(tokens)


class MemoryServer:
    """What the clients of one process share.

    Args:
        clock: seconds, for the expiry of leases.
    """

    def __init__(
        self, clock: Callable[[], float], max_payload_bytes: int = MAX_PAYLOAD_BYTES
    ) -> None:
        self.max_payload_bytes = max_payload_bytes
        self.running = True
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}
        self._subscriptions: list[MemorySubscription] = []
        self._turn = itertools.count()
        self._buses: list[MemoryBus] = []

    def attach(self, bus: MemoryBus) -> None:
        """Let a client in."""
        self._buses.append(bus)

    def detach(self, bus: MemoryBus) -> None:
        """Forget a client and its subscriptions."""
        self._buses.remove(bus)
        self._subscriptions = [item for item in self._subscriptions if item.bus is not bus]

    def stop(self) -> None:
        """Cut every connection, as a killed server does."""
        self.running = False
        for bus in self._buses:
            bus.lose_connection()

    def start(self, *, wipe_store: bool) -> None:
        """Take connections again, with or without what was stored."""
        if wipe_store:
            self._buckets.clear()
        self.running = True
        for bus in self._buses:
            bus.regain_connection()

    def subscribe(self, subscription: MemorySubscription) -> None:
        """Deliver to it from now on."""
        self._subscriptions.append(subscription)

    def unsubscribe(self, subscription: MemorySubscription) -> None:
        """Deliver no more; idempotent."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    def route(self, message: BusMessage) -> bool:
        """Hand the message to all that want it; False where nobody does."""
        groups: dict[tuple[str, str], list[MemorySubscription]] = defaultdict(list)
        wanted = False
        for subscription in self._subscriptions:
            if not subject_matches(subscription.subject, message.subject):
                continue
            wanted = True
            if subscription.queue:
                groups[subscription.subject, subscription.queue].append(subscription)
            else:
                subscription.enqueue(message)
        for members in groups.values():
            members[next(self._turn) % len(members)].enqueue(message)
        return wanted

    def bucket(self, name: str, ttl_seconds: float | None) -> Bucket:
        """Open or create a bucket, expired keys removed."""
        bucket = self._buckets.setdefault(name, Bucket(ttl_seconds))
        if bucket.ttl_seconds is not None:
            oldest = self._clock() - bucket.ttl_seconds
            for key in [key for key, stored in bucket.keys.items() if stored.written_at <= oldest]:
                del bucket.keys[key]
        return bucket

    def write(
        self, name: str, ttl_seconds: float | None, key: str, value: bytes | None
    ) -> KeyValueEntry:
        """Store a value, or a deletion, and tell the watchers."""
        bucket = self.bucket(name, ttl_seconds)
        bucket.revision += 1
        bucket.keys[key] = StoredValue(value, bucket.revision, self._clock())
        entry = KeyValueEntry(key, value, bucket.revision)
        for bus in self._buses:
            bus.tell_watchers(name, entry)
        return entry


class MemorySubscription:
    """One subscription: a queue and the task that empties it, one message after another."""

    def __init__(self, bus: MemoryBus, subject: str, handler: MessageHandler, queue: str) -> None:
        self.bus = bus
        self.subject = subject
        self.queue = queue
        self._handler = handler
        self._messages: asyncio.Queue[BusMessage] = asyncio.Queue()
        self._task = asyncio.create_task(self._deliver(), name=f"subscription {subject}")

    def enqueue(self, message: BusMessage) -> None:
        """Put a message in the subscription's queue."""
        self._messages.put_nowait(message)

    async def _deliver(self) -> None:
        log = structlog.get_logger(client=self.bus.name)
        while True:
            message = await self._messages.get()
            try:
                await self._handler(message)
            except Exception:
                self.bus.stats.handler_errors += 1
                log.exception("bus.handler_failed", subject=message.subject)
            finally:
                self._messages.task_done()

    async def drained(self) -> None:
        """Return when what arrived so far is handled."""
        await self._messages.join()

    async def unsubscribe(self) -> None:
        """Stop delivery. Idempotent."""
        self.bus.server.unsubscribe(self)
        self._task.cancel()


class MemoryBus:
    """One client's connection to a `MemoryServer`."""

    def __init__(self, server: MemoryServer, name: str) -> None:
        if not server.running:
            raise BusDisconnectedError("the server is down")
        self.server = server
        self.name = name
        self.stats = BusStats()
        self.watchers: list[tuple[str, WatchFeed]] = []
        self._connected = True
        self._closed = asyncio.Event()
        self._inbox_numbers = itertools.count(1)
        self._answers: dict[str, asyncio.Future[bytes]] = {}
        self._no_responders: dict[str, Callable[[str], Awaitable[None]]] = {}
        self._subscriptions: list[MemorySubscription] = []
        self._outbox: list[BusMessage] = []
        self._reconnect_handlers: list[ReconnectHandler] = []
        self._tasks: set[asyncio.Task[None]] = set()
        server.attach(self)

    @property
    def is_connected(self) -> bool:
        return self._connected

    @property
    def max_payload_bytes(self) -> int:
        return self.server.max_payload_bytes

    def require_connection(self) -> None:
        """Raise BusDisconnectedError where the server is down."""
        if not self._connected:
            raise BusDisconnectedError(f"{self.name} has no connection to the server")

    def lose_connection(self) -> None:
        """Called by the server when it goes down."""
        self._connected = False
        self.stats.disconnects += 1
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(BusDisconnectedError("the connection went down"))

    def regain_connection(self) -> None:
        """Called by the server when it is back."""
        self._connected = True
        self.stats.reconnects += 1
        for message in self._outbox:
            self._send(message)
        self._outbox.clear()
        for _, feed in self.watchers:
            feed.resync()
        for handler in self._reconnect_handlers:
            self._own(self._run_reconnect_handler(handler))

    def tell_watchers(self, bucket: str, entry: KeyValueEntry) -> None:
        """Called by the server for every write."""
        for name, feed in self.watchers:
            if name == bucket and self._connected:
                feed.push(entry)

    async def publish(self, subject: str, payload: bytes, *, reply: str = "") -> None:
        if self._closed.is_set():
            raise BusDisconnectedError(f"{self.name} is closed")
        if len(payload) > self.max_payload_bytes:
            raise PayloadTooLargeError(f"message to {subject} has {len(payload)} bytes")
        if subject.split() != [subject]:
            raise BusError(f"{subject!r} is no subject")
        message = BusMessage(subject, payload, reply)
        if self._connected:
            self._send(message)
            return
        waiting = sum(len(item.payload) for item in self._outbox)
        if waiting + len(payload) > PENDING_BYTES:
            raise BusDisconnectedError(f"{self.name} is disconnected and its buffer is full")
        self._outbox.append(message)

    def _send(self, message: BusMessage) -> None:
        if self.server.route(message) or not message.reply:
            return
        if message.reply in self._no_responders:
            self._own(self._run_no_responders(message))
        elif (answer := self._answers.get(message.reply)) and not answer.done():
            answer.set_exception(NoRespondersError(f"nobody listens on {message.subject}"))

    async def request(self, subject: str, payload: bytes, *, timeout_seconds: float) -> bytes:
        self.require_connection()
        inbox = f"_INBOX.{self.name}.{next(self._inbox_numbers)}"
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def receive(message: BusMessage) -> None:
            if not answer.done():
                answer.set_result(message.payload)

        subscription = await self.subscribe(inbox, receive)
        self._answers[inbox] = answer
        try:
            await self.publish(subject, payload, reply=inbox)
            async with asyncio.timeout(timeout_seconds):
                return await answer
        except TimeoutError as error:
            raise BusTimeoutError(f"no answer on {subject} within {timeout_seconds:g} s") from error
        finally:
            answer.cancel()
            del self._answers[inbox]
            await subscription.unsubscribe()

    async def subscribe(
        self, subject: str, handler: MessageHandler, *, queue: str = ""
    ) -> Subscription:
        if self._closed.is_set():
            raise BusDisconnectedError(f"{self.name} is closed")
        subscription = MemorySubscription(self, subject, handler, queue)
        self._subscriptions.append(subscription)
        self.server.subscribe(subscription)
        return subscription

    async def subscribe_no_responders(self, handler: Callable[[str], Awaitable[None]]) -> str:
        inbox = f"_INBOX.{self.name}.{next(self._inbox_numbers)}"
        self._no_responders[inbox] = handler
        return inbox

    async def key_value(
        self, bucket: str, *, ttl_seconds: float | None = None, history: int = 1
    ) -> MemoryKeyValue:
        self.require_connection()
        self.server.bucket(bucket, ttl_seconds)
        return MemoryKeyValue(self, bucket, ttl_seconds)

    def on_reconnect(self, handler: ReconnectHandler) -> None:
        self._reconnect_handlers.append(handler)

    async def flush(self, *, timeout_seconds: float) -> None:
        self.require_connection()

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def close(self) -> None:
        if self._closed.is_set():
            return
        self.server.detach(self)
        for subscription in self._subscriptions:
            await subscription.drained()
            await subscription.unsubscribe()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._connected = False
        self._closed.set()

    def _own(self, coroutine: Awaitable[None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_reconnect_handler(self, handler: ReconnectHandler) -> None:
        try:
            await handler()
        except Exception:
            self.stats.handler_errors += 1
            structlog.get_logger(client=self.name).exception("bus.reconnect_handler_failed")

    async def _run_no_responders(self, message: BusMessage) -> None:
        try:
            await self._no_responders[message.reply](message.subject)
        except Exception:
            self.stats.handler_errors += 1
            structlog.get_logger(client=self.name).exception("bus.no_responders_handler_failed")
