"""The NATS bus when the server dies, comes back empty, or does not let us in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import nkeys
import pytest
import pytest_asyncio
from nats.js.kv import KeyValue as ClientKeyValue

from shared.bus.base import BusDisconnectedError, BusError, BusMessage, BusTimeoutError
from shared.bus.nats import Credentials, NatsBus, connect
from shared.bus.nats_kv import NatsKeyValue
from shared.embedded_nats import EmbeddedNats
from shared.errors import ConfigError
from tests.conftest import eventually

PASSWORD = "p@ss/word"
USERS = f"""
authorization {{ users = [ {{user: "kun serve", password: "{PASSWORD}"}} ] }}
"""


@pytest_asyncio.fixture
async def bus(own_nats_server: EmbeddedNats) -> AsyncIterator[NatsBus]:
    connected = await connect(own_nats_server.url, service="test", instance="a")
    yield connected
    await connected.close()


async def restart_empty(server: EmbeddedNats) -> None:
    """kill -9, then a new server on the same port whose store is empty."""
    await server.kill()
    await server.start()


async def test_everything_works_again_after_the_server_lost_its_store(
    own_nats_server: EmbeddedNats, bus: NatsBus, unique: str
) -> None:
    received: list[bytes] = []
    reconnected = asyncio.Event()

    async def answer(message: BusMessage) -> None:
        received.append(message.payload)
        if message.reply:
            await bus.publish(message.reply, b"answer")

    async def note() -> None:
        reconnected.set()

    await bus.subscribe(unique, answer)
    bus.on_reconnect(note)
    store = await bus.key_value(unique, ttl_seconds=5, history=2)
    for number in range(10):
        await store.put("old", str(number).encode())
    watched: dict[str, bytes | None] = {}

    async def follow() -> None:
        async with contextlib.aclosing(store.watch()) as watch:
            async for entry in watch:
                watched[entry.key] = entry.value

    following = asyncio.create_task(follow())
    try:
        await eventually(lambda: watched == {"old": b"9"})
        await restart_empty(own_nats_server)
        async with asyncio.timeout(10):
            await reconnected.wait()
        assert bus.is_connected
        assert await bus.request(unique, b"hello", timeout_seconds=5) == b"answer"
        assert received == [b"hello"]
        assert await store.entries() == {}
        await eventually(lambda: watched == {"old": None})
        assert await store.put("new", b"1") <= 2
        assert {key: entry.value for key, entry in (await store.entries()).items()} == {"new": b"1"}
        await eventually(lambda: watched == {"old": None, "new": b"1"})
        await store.put("new", b"2")
        await eventually(lambda: watched["new"] == b"2")
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert (bus.stats.disconnects, bus.stats.reconnects) == (1, 1)


async def test_a_bucket_deleted_while_connected_is_made_again(
    bus: NatsBus, own_nats_server: EmbeddedNats, unique: str
) -> None:
    store = await bus.key_value(unique)
    for _ in range(3):
        await store.put("a", b"1")
    await bus.request(f"$JS.API.STREAM.DELETE.KV_{unique}", b"", timeout_seconds=5)
    assert await store.get("a") is None
    assert await store.put("a", b"2") == 1
    entry = await store.get("a")
    assert entry is not None
    assert entry.value == b"2"


async def test_a_store_that_survived_the_restart_is_used_again(tmp_path: Path, unique: str) -> None:
    async with EmbeddedNats(store_dir=tmp_path) as server:
        bus = await connect(server.url, service="test", instance="a")
        try:
            store = await bus.key_value(unique)
            revision = await store.put("a", b"1")
            await server.stop()
            await eventually(lambda: not bus.is_connected)
            await server.start()
            await eventually(lambda: bus.is_connected)
            assert await store.update("a", b"2", revision) == revision + 1
        finally:
            await bus.close()


async def test_what_is_in_flight_fails_at_once_when_the_server_dies(
    own_nats_server: EmbeddedNats, bus: NatsBus, unique: str
) -> None:
    asked = asyncio.Event()

    async def never_answer(message: BusMessage) -> None:
        asked.set()

    await bus.subscribe(unique, never_answer)
    store = await bus.key_value(unique)
    waiting = asyncio.create_task(bus.request(unique, b"", timeout_seconds=600))
    async with asyncio.timeout(10):
        await asked.wait()
        await own_nats_server.kill()
        with pytest.raises(BusDisconnectedError):
            await waiting
        with pytest.raises(BusDisconnectedError):
            await bus.request(unique, b"", timeout_seconds=600)
        with pytest.raises(BusError):
            await store.put("a", b"1")


async def publish_until_refused(bus: NatsBus, subject: str) -> int:
    for sent in range(100):
        try:
            await bus.publish(subject, bytes(1024 * 1024))
        except BusDisconnectedError:
            return sent
    raise AssertionError("100 MiB were taken while disconnected")


async def test_published_while_disconnected_is_sent_later_or_refused(
    own_nats_server: EmbeddedNats, bus: NatsBus, unique: str
) -> None:
    received: list[bytes] = []

    async def keep(message: BusMessage) -> None:
        received.append(message.payload[:1])

    await bus.subscribe(unique, keep)
    await own_nats_server.kill()
    await eventually(lambda: not bus.is_connected)
    sent = await publish_until_refused(bus, unique)
    assert sent > 0
    await own_nats_server.start()
    await eventually(lambda: len(received) == sent)


async def test_flush_after_a_timeout_leaves_the_connection_usable(
    bus: NatsBus, unique: str
) -> None:
    with pytest.raises(BusTimeoutError):
        await bus.flush(timeout_seconds=0.0)
    await bus.flush(timeout_seconds=5)


async def test_another_connection_may_close_while_the_server_is_gone(
    own_nats_server: EmbeddedNats,
) -> None:
    bus = await connect(own_nats_server.url, service="test", instance="b")
    await own_nats_server.kill()
    async with asyncio.timeout(15):
        await bus.close()


# --- not let in ----------------------------------------------------------------------------------


async def test_an_unreachable_server_is_a_configuration_error() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"nats://127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"cannot reach NATS at 127\.0\.0\.1:\d+") as caught:
            await connect(url, service="test", instance="a", connect_timeout_seconds=0.6)
    assert "\n" not in str(caught.value)


async def test_a_server_that_starts_late_is_found() -> None:
    async with EmbeddedNats() as server:
        await server.kill()
        connecting = asyncio.create_task(connect(server.url, service="test", instance="a"))
        await server.start()
        await (await connecting).close()


async def test_something_else_on_the_port_is_a_configuration_error() -> None:
    async def say_hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail ready\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(say_hello, "127.0.0.1", 0) as mail:
        url = f"nats://127.0.0.1:{mail.sockets[0].getsockname()[1]}"
        with pytest.raises(ConfigError, match="cannot reach NATS"):
            await connect(url, service="test", instance="a", connect_timeout_seconds=0.6)


@pytest.mark.parametrize("url", ["http://localhost:4222", "nats://", "nats://host:port", ""])
async def test_a_url_that_is_none_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError, match="NATS URL"):
        await connect(url, service="test", instance="a")


async def test_user_and_password() -> None:
    async with EmbeddedNats(extra_config=USERS) as server:
        address = server.url.removeprefix("nats://")
        good = f"nats://kun%20serve:p%40ss%2Fword@{address}"
        bus = await connect(good, service="test", instance="a")
        await bus.flush(timeout_seconds=5)
        await bus.close()
        for wrong in (f"nats://kun%20serve:nope@{address}", f"nats://{address}"):
            async with asyncio.timeout(5):
                with pytest.raises(ConfigError, match="refused the credentials") as caught:
                    await connect(wrong, service="test", instance="a")
            assert "nope" not in str(caught.value)


async def test_nkey(tmp_path: Path) -> None:
    # An example key pair made for this test.
    seed = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER)
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    key_file = tmp_path / "user.nk"
    key_file.write_bytes(seed)
    users = f'authorization {{ users = [ {{nkey: "{public}"}} ] }}'
    async with EmbeddedNats(extra_config=users) as server:
        bus = await connect(
            server.url, service="test", instance="a", credentials=Credentials(nkey_file=key_file)
        )
        await bus.flush(timeout_seconds=5)
        await bus.close()
        with pytest.raises(ConfigError, match="refused the credentials"):
            await connect(server.url, service="test", instance="a")


@pytest.mark.parametrize("option", ["creds_file", "nkey_file"])
async def test_unusable_credential_files(tmp_path: Path, option: str) -> None:
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.touch()
    for path in (missing, empty):
        with pytest.raises(ConfigError, match=str(path)):
            Credentials(**{option: path}).check()


async def test_a_server_that_is_slow_at_first_is_asked_for_a_bucket_again(
    own_nats_server: EmbeddedNats, bus: NatsBus, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[NatsKeyValue] = []
    find_or_create = NatsKeyValue._find_or_create

    async def counted(store: NatsKeyValue) -> ClientKeyValue:
        attempts.append(store)
        return await find_or_create(store)

    monkeypatch.setattr(NatsKeyValue, "_find_or_create", counted)
    os.kill(own_nats_server.pid, signal.SIGSTOP)
    opening = asyncio.create_task(bus.key_value(unique))
    await eventually(lambda: len(attempts) > 1)
    os.kill(own_nats_server.pid, signal.SIGCONT)
    store = await opening
    assert await store.put("key", b"value") > 0
