"""Steps that two sides take at once: both go on, or both know why not."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from services.worker.channels.base import ChannelError
from services.worker.channels.deadline import call_within
from services.worker.channels.dialogue import Dialogue, Particulars
from services.worker.links.base import LinkError

SECONDS = 20.0


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with near, far:
        yield near, far


@pytest.fixture
def peer() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def fail() -> None:
    raise RuntimeError("no memory for that")


def nothing() -> None:
    pass


def test_both_learn_what_the_other_gives(
    sockets: tuple[socket.socket, socket.socket], peer: ThreadPoolExecutor
) -> None:
    near, far = (Dialogue(each, SECONDS) for each in sockets)
    reader, writer = os.pipe()
    answer: Future[tuple[int, Particulars]] = peer.submit(
        far.agree, lambda: 7, lambda made: Particulars(bytes([made]), [writer])
    )
    made, theirs = near.agree(lambda: "x" * 100_000, lambda made: Particulars(made.encode()))
    assert (len(made), theirs.content) == (100_000, b"\7")
    assert answer.result(SECONDS)[1].content == made.encode()
    (file,) = theirs.files
    os.write(file, b"through")
    os.close(file)
    assert os.read(reader, 10) == b"through"
    assert os.read(reader, 10) == b""  # who passed the descriptor on has it no more
    os.close(reader)


def test_a_step_that_fails_fails_on_both_sides(
    sockets: tuple[socket.socket, socket.socket], peer: ThreadPoolExecutor
) -> None:
    near, far = (Dialogue(each, SECONDS) for each in sockets)
    answer = peer.submit(far.agree, fail)
    with pytest.raises(ChannelError, match="the peer says: no memory for that"):
        near.agree(nothing)
    with pytest.raises(ChannelError, match=r"^no memory for that"):
        answer.result(SECONDS)
    answer = peer.submit(far.agree, nothing)  # they go on talking
    near.agree(nothing)
    answer.result(SECONDS)


def test_a_peer_that_hangs_up_is_noticed(sockets: tuple[socket.socket, socket.socket]) -> None:
    sockets[1].close()
    with pytest.raises(LinkError, match="cannot be set up"):
        Dialogue(sockets[0], SECONDS).agree(nothing)


def test_a_silent_peer_is_given_up(sockets: tuple[socket.socket, socket.socket]) -> None:
    began_at = time.monotonic()
    with pytest.raises(LinkError, match="took too long"):
        Dialogue(sockets[0], 0.2).agree(nothing)
    assert time.monotonic() - began_at < SECONDS / 2


def test_what_is_not_a_message_ends_it(sockets: tuple[socket.socket, socket.socket]) -> None:
    sockets[1].sendall(b"\3\0\0\0abc")
    with pytest.raises(LinkError, match="malformed Turn"):
        Dialogue(sockets[0], SECONDS).agree(nothing)


def test_a_late_call_is_left_alone_and_its_result_discarded() -> None:
    go_on, late = threading.Event(), threading.Event()

    def call() -> str:
        go_on.wait(SECONDS)
        return "late"

    with pytest.raises(TimeoutError):
        call_within(0.05, call, lambda result: late.set() if result == "late" else None)
    assert not late.is_set()
    go_on.set()
    assert late.wait(SECONDS)
    assert call_within(SECONDS, lambda: "in time", nothing) == "in time"  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no memory"):
        call_within(SECONDS, fail, nothing)  # type: ignore[arg-type]
