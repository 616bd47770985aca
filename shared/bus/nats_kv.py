"""Key-value buckets on JetStream that outlive a server which lost its store.

Two deviations from nats-py's `KeyValue`. Every operation that finds the bucket missing creates it
again and is repeated once. And `watch` needs no JetStream consumer: the bucket republishes each
write on a core subject, which any subscription hears, before and after a server restart or a
re-created bucket.

    put --> $KV.<bucket>.<key> --> stream KV_<bucket> --> kv.<bucket>.<key> --> WatchFeed
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api
from nats.js.kv import KeyValue as ClientKeyValue

from shared.bus.base import (
    BusError,
    BusTimeoutError,
    KeyValueEntry,
    NoRespondersError,
    RevisionConflictError,
)
from shared.bus.watch import WatchFeed

if TYPE_CHECKING:
    from shared.bus.nats import NatsBus

OPERATION_TIMEOUT_SECONDS = 2.0
OPEN_TIMEOUT_SECONDS = 20.0
#: Markers of deleted keys are swept after this; readers that missed one re-read the bucket.
DELETE_MARKER_SECONDS = 60.0
HEADER_SEQUENCE, HEADER_OPERATION = "Nats-Sequence", "KV-Operation"
ERR_STREAM_NAME_IN_USE = 10058

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class BucketConfig:
    """What a bucket is created with."""

    name: str
    ttl_seconds: float | None
    history: int

    @property
    def stream(self) -> str:
        return f"KV_{self.name}"

    @property
    def prefix(self) -> str:
        return f"$KV.{self.name}."

    @property
    def hints_prefix(self) -> str:
        return f"kv.{self.name}."

    def differs(self, present: api.StreamConfig) -> str:
        """What an existing bucket has that this one should not have; "" where they agree."""
        if (present.max_age or 0) != (self.ttl_seconds or 0):
            return f"a TTL of {present.max_age or 0:g} s instead of {self.ttl_seconds or 0:g} s"
        if present.max_msgs_per_subject != self.history:
            return f"a history of {present.max_msgs_per_subject} instead of {self.history}"
        if present.republish is None or present.republish.dest != f"{self.hints_prefix}>":
            return "no republishing of its changes"
        return ""


class NatsKeyValue:
    """One bucket. Made by `NatsBus.key_value`."""

    def __init__(self, bus: NatsBus, jetstream: JetStreamContext, config: BucketConfig) -> None:
        self._bus = bus
        self._jetstream = jetstream
        self._config = config
        self._store: ClientKeyValue | None = None

    async def open(self) -> None:
        """Find or create the bucket; raises BusError, also where it has other settings.

        Services open theirs when they start, with the server or while its disk is busy: what takes
        it too long is asked again, for a while.
        """
        gives_up_at = time.monotonic() + OPEN_TIMEOUT_SECONDS
        while self._store is None:
            try:
                self._store = await self._run(self._find_or_create())
            except BusTimeoutError:
                if time.monotonic() >= gives_up_at:
                    raise

    async def get(self, key: str) -> KeyValueEntry | None:
        async def operation(store: ClientKeyValue) -> KeyValueEntry | None:
            try:
                entry = await store.get(key)
            except nats.js.errors.KeyNotFoundError:
                return None
            return KeyValueEntry(key, entry.value or b"", int(entry.revision or 0))

        entry: KeyValueEntry | None = await self._recovering(operation)
        return entry

    async def put(self, key: str, value: bytes) -> int:
        return await self._recovering(lambda store: store.put(key, value))

    async def create(self, key: str, value: bytes) -> int:
        return await self._recovering(lambda store: store.create(key, value))

    async def update(self, key: str, value: bytes, revision: int) -> int:
        return await self._recovering(lambda store: store.update(key, value, last=revision))

    async def delete(self, key: str) -> None:
        await self._recovering(lambda store: store.purge(key, msg_ttl=DELETE_MARKER_SECONDS))

    async def entries(self) -> dict[str, KeyValueEntry]:
        prefix = self._config.prefix

        async def list_keys(store: ClientKeyValue) -> list[str]:
            info = await self._jetstream.stream_info(
                self._config.stream, subjects_filter=f"{prefix}>"
            )
            return [subject.removeprefix(prefix) for subject in info.state.subjects or {}]

        entries = [await self.get(key) for key in await self._recovering(list_keys)]
        return {entry.key: entry for entry in entries if entry is not None}

    async def watch(self) -> AsyncGenerator[KeyValueEntry, None]:
        feed = WatchFeed(self.entries)
        prefix = self._config.hints_prefix

        async def deliver(message: Msg) -> None:
            headers = message.headers or {}
            feed.push(
                KeyValueEntry(
                    key=message.subject.removeprefix(prefix),
                    value=None if HEADER_OPERATION in headers else message.data,
                    revision=int(headers[HEADER_SEQUENCE]),
                )
            )

        subscription = await self._bus.subscribe_raw(f"{prefix}>", deliver)
        self._bus.feeds.add(feed)
        try:
            async with aclosing(feed.changes()) as changes:
                async for entry in changes:
                    yield entry
        finally:
            self._bus.feeds.discard(feed)
            await subscription.unsubscribe()

    # --- recovery --------------------------------------------------------------------------------

    async def _recovering(
        self, operation: Callable[[ClientKeyValue], Coroutine[Any, Any, Result]]
    ) -> Result:
        """Run `operation`; where the bucket is missing create it and run it once more."""
        if self._store is None:
            self._store = await self._run(self._find_or_create())
        try:
            return await self._run(operation(self._store))
        except _MissingBucketError:
            self._store = await self._run(self._find_or_create())
            return await self._run(operation(self._store))

    async def _run(self, operation: Coroutine[Any, Any, Result]) -> Result:
        name = self._config.name
        try:
            return await self._bus.while_connected(operation, name, OPERATION_TIMEOUT_SECONDS)
        except nats.js.errors.KeyWrongLastSequenceError as error:
            raise RevisionConflictError(f"bucket {name}: {error.description}") from error
        except (
            NoRespondersError,
            nats.js.errors.NoStreamResponseError,
            nats.js.errors.NotFoundError,
        ) as error:
            raise _MissingBucketError(f"bucket {name} is missing on the server") from error
        except nats.js.errors.Error as error:
            raise BusError(f"bucket {name}: {error}") from error

    async def _find_or_create(self) -> ClientKeyValue:
        config = self._config
        try:
            info = await self._jetstream.stream_info(config.stream)
        except nats.js.errors.NotFoundError:
            info = await self._create()
        if difference := config.differs(info.config):
            raise BusError(
                f"the bucket {config.name} on the NATS server has {difference}; delete it or use"
                " another --deployment"
            )
        return await self._jetstream.key_value(config.name)

    async def _create(self) -> api.StreamInfo:
        config = self._config
        try:
            await self._jetstream.create_key_value(
                bucket=config.name,
                ttl=config.ttl_seconds,
                history=config.history,
                direct=True,
                republish=api.RePublish(src=f"{config.prefix}>", dest=f"{config.hints_prefix}>"),
            )
        except nats.js.errors.BadRequestError as error:
            if error.err_code != ERR_STREAM_NAME_IN_USE:
                raise
        return await self._jetstream.stream_info(config.stream)


class _MissingBucketError(BusError):
    """The server does not know the bucket: it lost its store, or JetStream is off."""
