"""What every link must do, over every transport, with a peer in this process and in another."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest

from services.worker.links.base import (
    DownReason,
    LinkClass,
    LinkDownError,
    LinkError,
    LinkFrame,
    Transport,
)
from services.worker.links.config import LinkConfig
from tests.conftest import eventually
from tests.link_peer import (
    Kind,
    Linked,
    linked_here,
    linked_process,
    payload,
    send_patiently,
)

MIB = 1024 * 1024
CONTROL, EXCHANGE, RESTORE = LinkClass

Open = Callable[[LinkConfig], contextlib.AbstractContextManager[Linked]]


@pytest.fixture(params=Transport)
def transport(request: pytest.FixtureRequest) -> Transport:
    chosen: Transport = request.param
    return chosen


@pytest.fixture(params=[linked_here, linked_process], ids=["here", "process"])
def open_link(request: pytest.FixtureRequest, transport: Transport) -> Open:
    """Opens a link to an agent in this process, or in one of its own."""
    return functools.partial(request.param, transport)


def frame_of(kind: Kind, *buffers: bytes | memoryview, header: bytes = b"") -> LinkFrame:
    return LinkFrame(kind, "g0", 1, header, buffers)


def flood(link_class: LinkClass, count: int, nbytes: int, seed: int) -> LinkFrame:
    return frame_of(Kind.FLOOD, header=msgpack.packb([link_class, count, nbytes, seed]))


# --- what arrives --------------------------------------------------------------------------------


@pytest.mark.parametrize("link_class", LinkClass)
async def test_frames_come_back_whole_and_in_order(open_link: Open, link_class: LinkClass) -> None:
    random_sizes = random.Random(link_class)
    sizes = [[0], [], [1], [8 * MIB], [4096, 0, 3], [random_sizes.randrange(MIB)] * 2]
    sizes += [[random_sizes.randrange(64 * 1024)] for _ in range(50)]
    sent = [
        frame_of(
            Kind.ECHO,
            *(payload(number, size) for size in each),
            header=bytes([link_class]) + payload(number, number * 40),
        )
        for number, each in enumerate(sizes)
    ]
    with open_link(LinkConfig()) as linked:
        link, inbox = linked.link, linked.inbox
        for frame in sent:
            send_patiently(link, frame, link_class)
        await eventually(lambda: len(inbox.frames) == len(sent))
        for ours, theirs in zip(sent, inbox.frames, strict=True):
            assert (ours.kind, ours.group_id, ours.epoch) == (
                theirs.kind,
                theirs.group_id,
                theirs.epoch,
            )
            assert theirs.header == ours.header
            assert [bytes(buffer) for buffer in theirs.buffers] == list(ours.buffers)


async def test_received_buffers_are_writable_memory(open_link: Open) -> None:
    with open_link(LinkConfig()) as linked:
        link, inbox = linked.link, linked.inbox
        link.send(frame_of(Kind.ECHO, b"x" * 1000, header=b"\0"), CONTROL)
        await eventually(lambda: inbox.frames)
        buffer = inbox.frames[0].buffers[0]
        assert isinstance(buffer, memoryview)
        assert buffer.contiguous
        buffer[0] = 1
        assert buffer[0] == 1


async def test_control_buffers_may_change_after_send(open_link: Open) -> None:
    buffer = bytearray(b"a" * MIB)
    with open_link(LinkConfig()) as linked:
        link, inbox = linked.link, linked.inbox
        for letter in b"abcdefgh":
            buffer[:] = bytes([letter]) * MIB
            link.send(frame_of(Kind.ECHO, memoryview(buffer), header=b"\0"), CONTROL)
        buffer[:] = b"z" * MIB
        await eventually(lambda: len(inbox.frames) == 8)
        for letter, frame in zip(b"abcdefgh", inbox.frames, strict=True):
            assert bytes(frame.buffers[0]) == bytes([letter]) * MIB


async def test_borrowed_buffers_are_released_once(open_link: Open) -> None:
    released: list[int] = []
    with open_link(LinkConfig()) as linked:
        link = linked.link
        for number in range(20):
            data = payload(number, 100_000)
            link.send(
                frame_of(Kind.DATA, data), RESTORE, functools.partial(released.append, number)
            )
        await eventually(lambda: len(released) == 20)
    assert released == list(range(20))


async def test_both_directions_at_once(open_link: Open) -> None:
    count, nbytes = 12, 2 * MIB
    with open_link(LinkConfig()) as linked:
        link, inbox = linked.link, linked.inbox
        link.send(flood(EXCHANGE, count, nbytes, seed=100), CONTROL)
        for number in range(count):
            data = payload(number, nbytes)
            send_patiently(link, frame_of(Kind.ECHO, data, header=b"\2"), EXCHANGE)
        await eventually(lambda: len(inbox.frames) == 2 * count)
        floods, echoes = inbox.of_kind(Kind.DATA), inbox.of_kind(Kind.ECHO)
        for number in range(count):
            assert bytes(floods[number].buffers[0]) == payload(100 + number, nbytes)
            assert bytes(echoes[number].buffers[0]) == payload(number, nbytes)


async def test_statistics_add_up(open_link: Open) -> None:
    with open_link(LinkConfig()) as linked:
        link, inbox = linked.link, linked.inbox
        for _ in range(3):
            link.send(frame_of(Kind.ECHO, bytes(MIB), header=b"\1"), EXCHANGE)
        await eventually(lambda: len(inbox.frames) == 3)
        stats = link.stats()
        exchange = stats.classes[EXCHANGE]
        assert stats.transport is link.transport
        assert (exchange.frames_sent, exchange.bytes_sent) == (3, 3 * (MIB + 1))
        assert (exchange.frames_received, exchange.bytes_received) == (3, 3 * (MIB + 1))
        assert exchange.queued_bytes == 0
        assert stats.bandwidth_bytes_per_second


# --- priorities, limits --------------------------------------------------------------------------


async def test_control_overtakes_an_exchange(open_link: Open) -> None:
    with open_link(LinkConfig()) as linked:
        link, inbox = linked.link, linked.inbox
        link.send(frame_of(Kind.ECHO, bytes(64 * MIB), header=b"\1"), EXCHANGE)
        await eventually(lambda: link.stats().classes[EXCHANGE].chunks_sent > 2)
        link.send(frame_of(Kind.NOTE), CONTROL)
        chunks_sent = link.stats().classes[EXCHANGE].chunks_sent
        await eventually(lambda: inbox.of_kind(Kind.NOTE))
        chunks_received, frames_received = msgpack.unpackb(inbox.of_kind(Kind.NOTE)[0].header)
        assert chunks_received <= chunks_sent + 1
        assert frames_received == 0


async def test_exchange_goes_before_restore(open_link: Open) -> None:
    # The limit makes sure that all is queued before much is sent.
    config = LinkConfig(bandwidth_bytes_per_second=20 * MIB)
    with open_link(config) as linked:
        link, inbox = linked.link, linked.inbox
        link.send(frame_of(Kind.ECHO, bytes(4 * MIB), header=b"\0"), RESTORE)
        for number in range(4):
            header = bytes([CONTROL, number])
            link.send(frame_of(Kind.ECHO, bytes(MIB // 4), header=header), EXCHANGE)
        await eventually(lambda: len(inbox.frames) == 5)
        assert [frame.header for frame in inbox.frames] == [
            b"\0\0",
            b"\0\1",
            b"\0\2",
            b"\0\3",
            b"\0",
        ]


async def test_a_full_class_refuses_and_control_never_does(open_link: Open) -> None:
    config = LinkConfig(bandwidth_bytes_per_second=1 * MIB, exchange_limit_bytes=2 * MIB)
    with open_link(config) as linked:
        link, inbox = linked.link, linked.inbox
        assert link.send(frame_of(Kind.DATA, bytes(8 * MIB)), EXCHANGE)  # an empty class takes all
        assert not link.send(frame_of(Kind.DATA, b"x"), EXCHANGE)
        assert not link.wait_writable(EXCHANGE, 0.05)
        assert link.wait_writable(RESTORE, 0.05)
        for _ in range(10):
            assert link.send(frame_of(Kind.ECHO, bytes(1000), header=b"\0"), CONTROL)
        await eventually(lambda: len(inbox.frames) == 10)


async def test_a_full_class_opens_again(open_link: Open) -> None:
    with open_link(LinkConfig(exchange_limit_bytes=MIB)) as linked:
        link, inbox = linked.link, linked.inbox
        for number in range(16):
            frame = frame_of(Kind.ECHO, payload(number, MIB // 2), header=b"\0")
            send_patiently(link, frame, EXCHANGE)
        await eventually(lambda: len(inbox.frames) == 16)


def test_a_frame_that_is_not_contiguous_is_refused(open_link: Open) -> None:
    with open_link(LinkConfig()) as linked:
        link = linked.link
        for link_class in LinkClass:
            with pytest.raises(LinkError, match="contiguous"):
                link.send(frame_of(Kind.DATA, memoryview(bytes(100))[::2]), link_class)
        assert link.is_up


# --- the end -------------------------------------------------------------------------------------


async def test_an_idle_link_stays_up(open_link: Open) -> None:
    config = LinkConfig(heartbeat_seconds=0.05, silence_seconds=0.4)
    with open_link(config) as linked:
        link, inbox = linked.link, linked.inbox
        still = threading.Event()
        assert not still.wait(1.0)
        assert link.is_up
        assert not inbox.downs


async def test_a_killed_peer_is_noticed(transport: Transport) -> None:
    released: list[str] = []
    with linked_process(transport, LinkConfig()) as linked:
        link = linked.link
        os.kill(linked.pid, signal.SIGSTOP)
        link.send(frame_of(Kind.DATA, bytes(64 * MIB)), EXCHANGE, lambda: released.append("sent"))
        os.kill(linked.pid, signal.SIGKILL)
        await eventually(lambda: linked.inbox.downs)
        await eventually(lambda: released)
        assert not link.is_up
        for link_class in LinkClass:
            with pytest.raises(LinkDownError):
                link.send(frame_of(Kind.DATA, b"x"), link_class)
        assert link.wait_writable(EXCHANGE, 0.0)
        link.close()
        assert linked.inbox.downs == [DownReason.LOST]
        assert released == ["sent"]


async def test_a_peer_that_hangs_is_noticed(transport: Transport) -> None:
    with linked_process(transport, LinkConfig()) as linked:
        os.kill(linked.pid, signal.SIGSTOP)
        linked.link.send(frame_of(Kind.DATA, bytes(16 * MIB)), EXCHANGE)
        linked.link.send(frame_of(Kind.DATA, bytes(16 * MIB)), CONTROL)
        await eventually(lambda: linked.inbox.downs)
        linked.link.close()
        assert linked.inbox.downs == [DownReason.SILENT]


async def test_a_closed_link_tells_its_peer(transport: Transport) -> None:
    with linked_here(transport, LinkConfig()) as linked:
        linked.link.close()
        linked.link.close()
        await eventually(lambda: linked.far_inbox.downs)
        with pytest.raises(LinkDownError):
            linked.link.send(frame_of(Kind.DATA), CONTROL)
    assert linked.far_inbox.downs == [DownReason.CLOSED_BY_PEER]
    assert linked.inbox.downs == []


async def test_what_was_sent_before_the_end_arrives_before_it(transport: Transport) -> None:
    seen: list[object] = []
    with linked_here(transport, LinkConfig(), lambda _, frame: seen.append(frame.kind)) as linked:
        linked.inbox.downs = seen  # type: ignore[assignment]
        linked.link.send(frame_of(Kind.ECHO, bytes(MIB), header=b"\0"), CONTROL)
        await eventually(lambda: seen)
        far = linked.far
        if far is not None:
            far.send(frame_of(Kind.DATA, bytes(1000)), CONTROL)
            far.close()
        await eventually(lambda: len(seen) == 3)
    assert seen == [Kind.ECHO, Kind.DATA, DownReason.CLOSED_BY_PEER]


async def test_close_while_sending(open_link: Open) -> None:
    released: list[int] = []
    with open_link(LinkConfig()) as linked:
        link, inbox = linked.link, linked.inbox
        for number in range(4):
            data = bytes(16 * MIB)
            link.send(
                frame_of(Kind.DATA, data), EXCHANGE, functools.partial(released.append, number)
            )
        await eventually(lambda: link.stats().classes[EXCHANGE].chunks_sent)
        link.close()
        assert sorted(released) == [0, 1, 2, 3]
        assert inbox.downs == []


async def test_a_link_may_be_closed_in_its_own_callback(transport: Transport) -> None:
    before = set(threading.enumerate())
    with linked_here(transport, LinkConfig(), lambda link, _: link.close()) as linked:
        linked.link.send(frame_of(Kind.ECHO, b"x", header=b"\0"), CONTROL)
        await eventually(lambda: not linked.link.is_up)
    await eventually(lambda: set(threading.enumerate()) <= before)


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_nothing_is_left_behind(transport: Transport) -> None:
    before, threads = open_files(), threading.active_count()
    for _ in range(10):
        with linked_here(transport, LinkConfig()) as linked:
            linked.link.send(frame_of(Kind.ECHO, bytes(3 * MIB), header=b"\1"), EXCHANGE)
    gc.collect()
    assert open_files() <= before
    assert threading.active_count() == threads
    assert "kunserve-link" not in Path("/proc/self/maps").read_text()
