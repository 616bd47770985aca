"""The bus: what the services need of NATS, and no more.

Two implementations pass one contract suite (`tests/contract/`): `NatsBus` on a real nats-server and
`MemoryBus`, its twin inside one process. A service gets a `Bus` from its `main` and never
imports a client library.

Delivery is at most once and ordered per publisher and subject (core NATS). Whoever needs more puts
sequence numbers in the messages, as the token path does.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from shared.errors import KunserveError


class BusError(KunserveError):
    """The bus could not do what was asked."""


class NoRespondersError(BusError):
    """Nobody listens on the subject of a request: the peer is gone (NATS status 503)."""


class BusTimeoutError(BusError):
    """No answer within the deadline."""


class BusDisconnectedError(BusError):
    """The connection to the server is down (the client keeps reconnecting)."""


class PayloadTooLargeError(BusError):
    """The message is larger than the server's `max_payload`."""


class RevisionConflictError(BusError):
    """Compare-and-set lost: the key was written by somebody else meanwhile."""


@dataclass(frozen=True, slots=True)
class BusMessage:
    """One delivered message; `reply` is where an answer goes, "" where none is wanted."""

    subject: str
    payload: bytes
    reply: str = ""


@dataclass(frozen=True, slots=True)
class KeyValueEntry:
    """The value of a key at a revision; None where the key was deleted or has expired."""

    key: str
    value: bytes | None
    revision: int


@dataclass(slots=True)
class BusStats:
    """What went wrong on one connection so far; read by the metrics, written by the bus."""

    disconnects: int = 0
    reconnects: int = 0
    errors: int = 0
    slow_consumers: int = 0
    handler_errors: int = 0


#: Called on the event loop for each message. It must only decode and enqueue: the next message of
#: the subscription waits until it returns.
MessageHandler = Callable[[BusMessage], Awaitable[None]]

#: Called after the connection came back (subscriptions are already replayed).
ReconnectHandler = Callable[[], Awaitable[None]]


class Subscription(Protocol):
    """A running subscription."""

    async def unsubscribe(self) -> None:
        """Stop delivery. Idempotent."""
        ...


class KeyValue(Protocol):
    """One bucket of a replicated key-value store with revisions (NATS JetStream KV)."""

    async def get(self, key: str) -> KeyValueEntry | None:
        """Return the present entry, or None where there is none (deleted and expired included)."""
        ...

    async def put(self, key: str, value: bytes) -> int:
        """Write unconditionally; returns the new revision. Renews the key's lease."""
        ...

    async def create(self, key: str, value: bytes) -> int:
        """Write only if the key has no value; raises RevisionConflictError otherwise."""
        ...

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """Write only if the key is still at `revision`; raises RevisionConflictError otherwise."""
        ...

    async def delete(self, key: str) -> None:
        """Remove the key's value. Idempotent."""
        ...

    async def entries(self) -> dict[str, KeyValueEntry]:
        """Return all keys that have a value now."""
        ...

    def watch(self) -> AsyncGenerator[KeyValueEntry, None]:
        """Yield the present entries, then every change, until the generator is closed.

        The latest value of each key arrives in the end, intermediate ones may be left out: after a
        reconnect, when the server lost its store, and every few seconds, the watch reads the whole
        bucket again and yields what differs from what it told before (a key that is gone has the
        value None). Expiry of a lease shows up that way, so a watch notices it seconds late;
        callers that care read `entries()`.

        Use it inside `contextlib.aclosing`, so that leaving the loop ends the subscription.
        """
        ...


class Bus(Protocol):
    """Publish/subscribe, request/reply and key-value buckets over one connection."""

    @property
    def is_connected(self) -> bool:
        """True while the connection to the server is up."""
        ...

    @property
    def max_payload_bytes(self) -> int:
        """Largest message the server takes."""
        ...

    @property
    def stats(self) -> BusStats:
        """Counters of faults on this connection."""
        ...

    async def publish(self, subject: str, payload: bytes, *, reply: str = "") -> None:
        """Send and forget. While disconnected the client buffers up to a limit, then raises
        BusDisconnectedError. Where `reply` is given and nobody listens on `subject`, the server
        answers on `reply` with an empty payload whose status is 503 (see
        `subscribe_no_responders`)."""
        ...

    async def request(self, subject: str, payload: bytes, *, timeout_seconds: float) -> bytes:
        """Send and wait for one answer.

        Raises:
            NoRespondersError: at once, where nobody listens on `subject`.
            BusTimeoutError: no answer in time.
            BusDisconnectedError: the connection is down, or went down while waiting.
            PayloadTooLargeError: larger than `max_payload_bytes`.
        """
        ...

    async def subscribe(
        self, subject: str, handler: MessageHandler, *, queue: str = ""
    ) -> Subscription:
        """Deliver messages on `subject` (wildcards allowed) to `handler`.

        A `queue` name shares them among the members of that queue group. When this returns the
        server knows of the subscription; it survives reconnects. What `handler` raises is logged
        and counted, and the next message is delivered.
        """
        ...

    async def subscribe_no_responders(self, handler: Callable[[str], Awaitable[None]]) -> str:
        """Return a reply subject of this bus; `handler` is called with the subject of each message
        that was published with that reply and found no listener."""
        ...

    async def key_value(
        self, bucket: str, *, ttl_seconds: float | None = None, history: int = 1
    ) -> KeyValue:
        """Open the bucket, creating it where it does not exist. Keys of a bucket with a TTL vanish
        that long after their last write: a lease."""
        ...

    def on_reconnect(self, handler: ReconnectHandler) -> None:
        """Call `handler` after each re-established connection."""
        ...

    async def flush(self, *, timeout_seconds: float) -> None:
        """Return when the server has everything published so far.

        Raises BusTimeoutError or BusDisconnectedError.
        """
        ...

    async def wait_closed(self) -> None:
        """Return when the connection is closed for good: by `close()`, or by a server that no
        longer lets this client in. A service that did not close it must end itself."""
        ...

    async def close(self) -> None:
        """Drain subscriptions, flush, disconnect. Idempotent."""
        ...
