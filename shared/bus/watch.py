"""What both buses do for `KeyValue.watch`: turn hints and full reads into one stream of changes.

    hints (pushed) ------> WatchFeed ---> entries that differ from what was told before
    full reads (pulled) --^

Made by `NatsKeyValue.watch` and `MemoryKeyValue.watch`, one for each watcher.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable

from shared.bus.base import BusError, KeyValueEntry

#: How often a watch reads the whole bucket although nothing happened (anti-entropy).
RESYNC_SECONDS = 5.0
#: Wait after a full read failed.
RETRY_SECONDS = 0.5
#: More hints than this at once cost more than reading the bucket.
MAX_PENDING = 256


class WatchFeed:
    """Changes of one bucket for one watcher."""

    def __init__(self, read_all: Callable[[], Awaitable[dict[str, KeyValueEntry]]]) -> None:
        self._read_all = read_all
        self._pending: deque[KeyValueEntry] = deque()
        self._newest_hint = 0
        self._told: dict[str, KeyValueEntry] = {}
        self._must_read = True
        self._wake = asyncio.Event()

    def push(self, entry: KeyValueEntry) -> None:
        """Take a hint. Revisions of a bucket only rise, so a lower one means a lost store."""
        if entry.revision <= self._newest_hint or len(self._pending) >= MAX_PENDING:
            self._newest_hint = entry.revision
            self.resync()
            return
        self._newest_hint = entry.revision
        self._pending.append(entry)
        self._wake.set()

    def resync(self) -> None:
        """Forget the hints and read everything again."""
        self._pending.clear()
        self._must_read = True
        self._wake.set()

    async def changes(self) -> AsyncGenerator[KeyValueEntry, None]:
        """Yield what differs from what was yielded before, for ever."""
        while True:
            self._wake.clear()
            if self._must_read:
                for entry in await self._difference():
                    yield entry
            while self._pending:
                entry = self._pending.popleft()
                if self._is_news(entry):
                    self._remember(entry)
                    yield entry
            if self._must_read:
                continue
            try:
                async with asyncio.timeout(RESYNC_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                self._must_read = True

    async def _difference(self) -> list[KeyValueEntry]:
        self._must_read = False
        try:
            present = await self._read_all()
        except BusError:
            await asyncio.sleep(RETRY_SECONDS)
            self._must_read = True
            return []
        gone = [
            KeyValueEntry(key, None, entry.revision)
            for key, entry in self._told.items()
            if key not in present
        ]
        changed = [entry for entry in present.values() if self._told.get(entry.key) != entry]
        self._told = dict(present)
        return gone + changed

    def _is_news(self, entry: KeyValueEntry) -> bool:
        """False for what was told already, or is older than a full read that came in between.

        The same revision with another value is of a store that began anew.
        """
        told = self._told.get(entry.key)
        if told is None:
            return True
        return entry.revision > told.revision or (
            entry.revision == told.revision and entry.value != told.value
        )

    def _remember(self, entry: KeyValueEntry) -> None:
        if entry.value is None:
            self._told.pop(entry.key, None)
        else:
            self._told[entry.key] = entry
