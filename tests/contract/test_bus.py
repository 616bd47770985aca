"""What every bus must do, run on the in-memory twin and on a real nats-server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import pytest
import pytest_asyncio

from shared.bus.base import (
    Bus,
    BusError,
    BusMessage,
    BusTimeoutError,
    KeyValue,
    NoRespondersError,
    PayloadTooLargeError,
    RevisionConflictError,
)
from shared.bus.memory import MemoryBus, MemoryServer
from shared.bus.nats import connect
from shared.embedded_nats import EmbeddedNats
from tests.conftest import eventually

Connect = Callable[[], Awaitable[Bus]]
TTL_SECONDS = 0.6


@pytest.fixture(params=["memory", "nats"])
def server(request: pytest.FixtureRequest) -> MemoryServer | EmbeddedNats:
    """Where the buses of a test meet."""
    if request.param == "memory":
        return MemoryServer(clock=time.monotonic)
    real: EmbeddedNats = request.getfixturevalue("nats_server")
    return real


@pytest_asyncio.fixture
async def connect_bus(server: MemoryServer | EmbeddedNats) -> AsyncIterator[Connect]:
    """Make connections to one server; all are closed in the end."""
    buses: list[Bus] = []

    async def make() -> Bus:
        instance = f"i{len(buses)}"
        bus: Bus = (
            MemoryBus(server, instance)
            if isinstance(server, MemoryServer)
            else await connect(server.url, service="test", instance=instance)
        )
        buses.append(bus)
        return bus

    yield make
    for bus in buses:
        await bus.close()


class Inbox:
    """A handler that keeps what it gets."""

    def __init__(self) -> None:
        self.messages: list[BusMessage] = []

    async def __call__(self, message: BusMessage) -> None:
        self.messages.append(message)

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for message in self.messages]


# --- publish and subscribe -----------------------------------------------------------------------


async def test_messages_arrive_in_the_order_of_their_publisher(
    connect_bus: Connect, unique: str
) -> None:
    sender, receiver, inbox = await connect_bus(), await connect_bus(), Inbox()
    await receiver.subscribe(f"{unique}.a", inbox)
    sent = [str(number).encode() for number in range(500)]
    for payload in sent:
        await sender.publish(f"{unique}.a", payload)
    await eventually(lambda: len(inbox.messages) == len(sent))
    assert inbox.payloads == sent


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("w.*.gen", ["w.a.gen", "w.b.gen"], ["w.a.ctl", "w.gen", "w.a.b.gen"]),
        ("w.>", ["w.a", "w.a.b"], ["w", "x.a"]),
        ("w.a", ["w.a"], ["w.A", "w.a.b"]),
    ],
)
async def test_wildcards(
    connect_bus: Connect, unique: str, pattern: str, matching: list[str], other: list[str]
) -> None:
    bus, inbox, everything = await connect_bus(), Inbox(), Inbox()
    await bus.subscribe(f"{unique}.{pattern}", inbox)
    await bus.subscribe(f"{unique}.>", everything)
    for subject in [*matching, *other]:
        await bus.publish(f"{unique}.{subject}", b"")
    await eventually(lambda: len(everything.messages) == len(matching) + len(other))
    await eventually(lambda: len(inbox.messages) >= len(matching))
    assert [message.subject for message in inbox.messages] == [
        f"{unique}.{subject}" for subject in matching
    ]


async def test_a_queue_group_shares_and_other_subscribers_get_all(
    connect_bus: Connect, unique: str
) -> None:
    bus, first, second, all_messages = await connect_bus(), Inbox(), Inbox(), Inbox()
    await bus.subscribe(unique, first, queue="group")
    await bus.subscribe(unique, second, queue="group")
    await bus.subscribe(unique, all_messages)
    for number in range(60):
        await bus.publish(unique, str(number).encode())
    await eventually(lambda: len(all_messages.messages) == 60)
    await eventually(lambda: len(first.messages) + len(second.messages) == 60)
    assert sorted(first.payloads + second.payloads) == sorted(all_messages.payloads)
    assert first.messages
    assert second.messages


async def test_after_unsubscribe_nothing_is_delivered(connect_bus: Connect, unique: str) -> None:
    bus, gone, kept = await connect_bus(), Inbox(), Inbox()
    subscription = await bus.subscribe(unique, gone)
    await bus.subscribe(unique, kept)
    await subscription.unsubscribe()
    await subscription.unsubscribe()
    await bus.publish(unique, b"x")
    await eventually(lambda: kept.payloads == [b"x"])
    assert gone.messages == []


async def test_a_failing_handler_is_counted_and_does_not_end_the_subscription(
    connect_bus: Connect, unique: str
) -> None:
    bus, seen = await connect_bus(), Inbox()

    async def fail_once(message: BusMessage) -> None:
        await seen(message)
        if len(seen.messages) == 1:
            raise ValueError("broken")

    await bus.subscribe(unique, fail_once)
    await bus.publish(unique, b"1")
    await bus.publish(unique, b"2")
    await eventually(lambda: seen.payloads == [b"1", b"2"])
    assert bus.stats.handler_errors == 1


async def test_a_message_over_the_limit_is_refused(connect_bus: Connect, unique: str) -> None:
    bus = await connect_bus()
    with pytest.raises(PayloadTooLargeError):
        await bus.publish(unique, bytes(bus.max_payload_bytes + 1))
    with pytest.raises(PayloadTooLargeError):
        await bus.request(unique, bytes(bus.max_payload_bytes + 1), timeout_seconds=1)


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB b 0"])
async def test_a_bad_subject_is_refused(connect_bus: Connect, subject: str) -> None:
    bus = await connect_bus()
    with pytest.raises(BusError):
        await bus.publish(subject, b"")


# --- request and reply ---------------------------------------------------------------------------


async def test_request_gets_the_answer(connect_bus: Connect, unique: str) -> None:
    client, server = await connect_bus(), await connect_bus()

    async def double(message: BusMessage) -> None:
        await server.publish(message.reply, message.payload * 2)

    await server.subscribe(unique, double)
    answers = await asyncio.gather(
        *(client.request(unique, str(n).encode(), timeout_seconds=5) for n in range(20))
    )
    assert answers == [str(n).encode() * 2 for n in range(20)]


async def test_request_without_listener_fails_at_once(connect_bus: Connect, unique: str) -> None:
    bus = await connect_bus()
    async with asyncio.timeout(5):
        with pytest.raises(NoRespondersError):
            await bus.request(unique, b"", timeout_seconds=60)


async def test_request_without_answer_times_out(connect_bus: Connect, unique: str) -> None:
    bus = await connect_bus()
    await bus.subscribe(unique, Inbox())
    with pytest.raises(BusTimeoutError):
        await bus.request(unique, b"", timeout_seconds=0.05)
    await bus.flush(timeout_seconds=5)


async def test_a_publisher_learns_that_nobody_listens(connect_bus: Connect, unique: str) -> None:
    sender, receiver = await connect_bus(), await connect_bus()
    inbox, unheard = Inbox(), []

    async def note(subject: str) -> None:
        unheard.append(subject)

    reply = await sender.subscribe_no_responders(note)
    await receiver.subscribe(f"{unique}.heard", inbox)
    await sender.publish(f"{unique}.heard", b"x", reply=reply)
    await sender.publish(f"{unique}.lost", b"x", reply=reply)
    await eventually(lambda: unheard)
    assert unheard == [f"{unique}.lost"]
    assert inbox.payloads == [b"x"]


# --- key-value -----------------------------------------------------------------------------------


async def test_put_get_delete(connect_bus: Connect, unique: str) -> None:
    store = await (await connect_bus()).key_value(unique)
    assert await store.get("worker.a") is None
    revision = await store.put("worker.a", b"1")
    entry = await store.get("worker.a")
    assert entry is not None
    assert (entry.key, entry.value, entry.revision) == ("worker.a", b"1", revision)
    await store.delete("worker.a")
    await store.delete("worker.a")
    assert await store.get("worker.a") is None
    assert await store.entries() == {}


async def test_an_empty_value_is_a_value(connect_bus: Connect, unique: str) -> None:
    store = await (await connect_bus()).key_value(unique)
    await store.put("a", b"")
    assert (await store.entries())["a"].value == b""
    with pytest.raises(RevisionConflictError):
        await store.create("a", b"x")


async def test_revisions_rise_over_the_whole_bucket(connect_bus: Connect, unique: str) -> None:
    store = await (await connect_bus()).key_value(unique)
    revisions = [await store.put(key, b"x") for key in ("a", "b", "a", "c")]
    assert revisions == sorted(set(revisions))


async def test_compare_and_set_lets_one_writer_win(connect_bus: Connect, unique: str) -> None:
    first = await (await connect_bus()).key_value(unique)
    second = await (await connect_bus()).key_value(unique)
    seen = await first.put("plan", b"0")
    outcomes = await asyncio.gather(
        first.update("plan", b"1", seen),
        second.update("plan", b"2", seen),
        return_exceptions=True,
    )
    assert sum(isinstance(outcome, int) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, RevisionConflictError) for outcome in outcomes) == 1


async def test_create_only_where_there_is_no_value(connect_bus: Connect, unique: str) -> None:
    store = await (await connect_bus()).key_value(unique)
    revision = await store.create("a", b"1")
    with pytest.raises(RevisionConflictError):
        await store.create("a", b"2")
    await store.delete("a")
    assert await store.create("a", b"3") > revision


async def test_update_of_a_key_that_was_deleted_fails(connect_bus: Connect, unique: str) -> None:
    store = await (await connect_bus()).key_value(unique)
    revision = await store.put("a", b"1")
    await store.delete("a")
    with pytest.raises(RevisionConflictError):
        await store.update("a", b"2", revision)


async def test_a_lease_vanishes_unless_it_is_renewed(connect_bus: Connect, unique: str) -> None:
    store = await (await connect_bus()).key_value(unique, ttl_seconds=TTL_SECONDS)
    await store.put("dead", b"1")

    async def dead_is_gone() -> bool:
        await store.put("alive", b"1")
        return "dead" not in await store.entries()

    await eventually(dead_is_gone)
    assert "alive" in await store.entries()
    await eventually(lambda: gone(store, "alive"))
    await store.create("alive", b"again")


async def gone(store: KeyValue, key: str) -> bool:
    return await store.get(key) is None


async def test_watch_tells_the_present_and_then_changes(connect_bus: Connect, unique: str) -> None:
    writer = await (await connect_bus()).key_value(unique)
    reader = await (await connect_bus()).key_value(unique)
    await writer.put("a", b"1")
    async with aclosing(reader.watch()) as watch, asyncio.timeout(10):
        entry = await anext(watch)
        assert (entry.key, entry.value) == ("a", b"1")
        await writer.put("b", b"2")
        entry = await anext(watch)
        assert (entry.key, entry.value) == ("b", b"2")
        await writer.delete("a")
        entry = await anext(watch)
        assert (entry.key, entry.value) == ("a", None)


async def test_watch_ends_with_the_last_value_of_every_key(
    connect_bus: Connect, unique: str
) -> None:
    writer = await (await connect_bus()).key_value(unique)
    reader = await (await connect_bus()).key_value(unique)
    seen: dict[str, bytes | None] = {}

    async def follow() -> None:
        async with aclosing(reader.watch()) as watch:
            async for entry in watch:
                seen[entry.key] = entry.value

    following = asyncio.create_task(follow())
    try:
        for number in range(400):
            await writer.put(f"k{number % 7}", str(number).encode())
        expected = {f"k{number % 7}": str(number).encode() for number in range(393, 400)}
        await eventually(lambda: seen == expected)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_watch_notices_expired_leases(connect_bus: Connect, unique: str) -> None:
    store = await (await connect_bus()).key_value(unique, ttl_seconds=TTL_SECONDS)
    await store.put("a", b"1")
    async with aclosing(store.watch()) as watch, asyncio.timeout(20):
        assert (await anext(watch)).value == b"1"
        assert (await anext(watch)).value is None


async def test_opening_a_bucket_twice_shares_it(connect_bus: Connect, unique: str) -> None:
    first = await (await connect_bus()).key_value(unique, ttl_seconds=5, history=3)
    await first.put("a", b"1")
    second = await (await connect_bus()).key_value(unique, ttl_seconds=5, history=3)
    assert (await second.entries())["a"].value == b"1"


# --- end of a connection -------------------------------------------------------------------------


async def test_closing_is_idempotent_and_ends_the_wait(connect_bus: Connect, unique: str) -> None:
    bus = await connect_bus()
    await bus.subscribe(unique, Inbox())
    closed = asyncio.create_task(bus.wait_closed())
    await bus.close()
    await bus.close()
    async with asyncio.timeout(5):
        await closed
    assert not bus.is_connected
    with pytest.raises(BusError):
        await bus.publish(unique, b"")


async def test_closing_delivers_what_arrived_and_sends_what_was_published(
    connect_bus: Connect, unique: str
) -> None:
    sender, receiver, inbox = await connect_bus(), await connect_bus(), Inbox()
    await receiver.subscribe(unique, inbox)
    for number in range(200):
        await sender.publish(unique, str(number).encode())
    await sender.close()
    await eventually(lambda: len(inbox.messages) == 200)
