"""The stream of changes that watches are made of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from shared.bus.base import BusDisconnectedError, KeyValueEntry
from shared.bus.watch import MAX_PENDING, WatchFeed


class Store:
    """What a full read finds."""

    def __init__(self, *entries: KeyValueEntry) -> None:
        self.reads = 0
        self.failures = 0
        self.set(*entries)

    def set(self, *entries: KeyValueEntry) -> None:
        self.content = {entry.key: entry for entry in entries}

    async def read(self) -> dict[str, KeyValueEntry]:
        self.reads += 1
        if self.failures:
            self.failures -= 1
            raise BusDisconnectedError("down")
        return dict(self.content)


def entry(key: str, value: bytes | None, revision: int) -> KeyValueEntry:
    return KeyValueEntry(key, value, revision)


async def take(changes: AsyncGenerator[KeyValueEntry, None], count: int) -> list[KeyValueEntry]:
    async with asyncio.timeout(5):
        return [await anext(changes) for _ in range(count)]


async def test_present_entries_then_hints() -> None:
    store = Store(entry("a", b"1", 1), entry("b", b"2", 2))
    feed = WatchFeed(store.read)
    async with aclosing(feed.changes()) as changes:
        assert await take(changes, 2) == list(store.content.values())
        feed.push(entry("a", b"3", 3))
        feed.push(entry("b", None, 4))
        assert await take(changes, 2) == [entry("a", b"3", 3), entry("b", None, 4)]
    assert store.reads == 1


async def test_a_hint_older_than_what_was_read_is_not_told() -> None:
    store = Store(entry("a", b"2", 2))
    feed = WatchFeed(store.read)
    async with aclosing(feed.changes()) as changes:
        await take(changes, 1)
        feed.push(entry("a", b"1", 1))
        feed.push(entry("a", b"3", 3))
        assert await take(changes, 1) == [entry("a", b"3", 3)]


@pytest.mark.parametrize("by_hint", [True, False])
async def test_a_store_that_began_anew_may_reuse_a_revision(by_hint: bool) -> None:
    store = Store(entry("plan", b"old", 1))
    feed = WatchFeed(store.read)
    async with aclosing(feed.changes()) as changes:
        await take(changes, 1)
        store.set(entry("plan", b"new", 1))
        if by_hint:
            feed.push(entry("plan", b"new", 1))
        else:
            feed.resync()
        assert await take(changes, 1) == [entry("plan", b"new", 1)]


async def test_revisions_that_fall_make_it_read_everything() -> None:
    store = Store()
    feed = WatchFeed(store.read)
    async with aclosing(feed.changes()) as changes:
        feed.push(entry("a", b"1", 9))
        assert await take(changes, 1) == [entry("a", b"1", 9)]
        store.set(entry("b", b"1", 1))
        feed.push(entry("b", b"1", 1))
        assert await take(changes, 2) == [entry("a", None, 9), entry("b", b"1", 1)]


async def test_too_many_hints_are_replaced_by_one_reading() -> None:
    store = Store()
    feed = WatchFeed(store.read)
    async with aclosing(feed.changes()) as changes:
        feed.push(entry("k", b"first", 1))
        await take(changes, 1)
        for revision in range(2, MAX_PENDING + 4):
            feed.push(entry("k", str(revision).encode(), revision))
        store.set(entry("k", b"last", MAX_PENDING + 4))
        told = await take(changes, 1)
        while told[-1].value != b"last":
            told += await take(changes, 1)
    assert len(told) < MAX_PENDING
    assert store.reads == 2


async def test_a_reading_that_fails_is_tried_again() -> None:
    store = Store(entry("a", b"1", 1))
    store.failures = 1
    async with aclosing(WatchFeed(store.read).changes()) as changes:
        assert await take(changes, 1) == [entry("a", b"1", 1)]
    assert store.reads == 2
