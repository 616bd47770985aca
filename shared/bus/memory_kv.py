"""The buckets of a `MemoryServer`, and one client's view of a bucket."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shared.bus.base import KeyValueEntry, PayloadTooLargeError, RevisionConflictError
from shared.bus.watch import WatchFeed

if TYPE_CHECKING:
    from shared.bus.memory import MemoryBus


@dataclass
class StoredValue:
    """The last write of a key; a deletion has no value."""

    value: bytes | None
    revision: int
    written_at: float


@dataclass
class Bucket:
    """Keys with one counter of revisions."""

    ttl_seconds: float | None
    revision: int = 0
    keys: dict[str, StoredValue] = field(default_factory=dict)


class MemoryKeyValue:
    """One bucket as one client sees it."""

    def __init__(self, bus: MemoryBus, name: str, ttl_seconds: float | None) -> None:
        self._bus = bus
        self._name = name
        self._ttl_seconds = ttl_seconds

    def _bucket(self) -> Bucket:
        self._bus.require_connection()
        return self._bus.server.bucket(self._name, self._ttl_seconds)

    def _write(self, key: str, value: bytes | None) -> int:
        if value is not None and len(value) > self._bus.max_payload_bytes:
            raise PayloadTooLargeError(f"value of key {key} has {len(value)} bytes")
        return self._bus.server.write(self._name, self._ttl_seconds, key, value).revision

    async def get(self, key: str) -> KeyValueEntry | None:
        stored = self._bucket().keys.get(key)
        if stored is None or stored.value is None:
            return None
        return KeyValueEntry(key, stored.value, stored.revision)

    async def put(self, key: str, value: bytes) -> int:
        self._bucket()
        return self._write(key, value)

    async def create(self, key: str, value: bytes) -> int:
        stored = self._bucket().keys.get(key)
        if stored is not None and stored.value is not None:
            raise RevisionConflictError(f"key {key} has a value")
        return self._write(key, value)

    async def update(self, key: str, value: bytes, revision: int) -> int:
        stored = self._bucket().keys.get(key)
        if (stored.revision if stored else 0) != revision:
            raise RevisionConflictError(f"key {key} is no longer at revision {revision}")
        return self._write(key, value)

    async def delete(self, key: str) -> None:
        self._bucket()
        self._write(key, None)

    async def entries(self) -> dict[str, KeyValueEntry]:
        return {
            key: KeyValueEntry(key, stored.value, stored.revision)
            for key, stored in self._bucket().keys.items()
            if stored.value is not None
        }

    async def watch(self) -> AsyncGenerator[KeyValueEntry, None]:
        feed = WatchFeed(self.entries)
        self._bus.watchers.append((self._name, feed))
        try:
            async with aclosing(feed.changes()) as changes:
                async for entry in changes:
                    yield entry
        finally:
            self._bus.watchers.remove((self._name, feed))
