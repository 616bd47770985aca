"""A byte stream over TCP: between hosts, and wherever shared memory cannot be had."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Sequence

from services.worker.links.base import Transport
from services.worker.links.stream import READ_TICK_SECONDS, StreamClosedError

#: Unsent bytes the kernel may hold: what a CONTROL frame can find ahead of it there.
_NOTSENT_LOWAT_BYTES = 256 * 1024
_MAX_PIECES = 512  # below IOV_MAX
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


def set_read_tick(connection: socket.socket) -> None:
    """Let recv give up after a tick: one system call instead of poll and recv."""
    connection.setblocking(True)
    tick = struct.pack("@ll", 0, round(READ_TICK_SECONDS * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)


class TcpStream:
    """A connected TCP socket; owns it."""

    transport = Transport.TCP

    def __init__(self, connection: socket.socket) -> None:
        set_read_tick(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _NOTSENT_LOWAT_BYTES)
        self._socket = connection
        self._writable = select.poll()
        self._writable.register(connection, select.POLLOUT)

    def write_some(self, pieces: Sequence[memoryview]) -> int:
        try:
            return self._socket.sendmsg(pieces[:_MAX_PIECES], (), _SEND_FLAGS)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise StreamClosedError(f"TCP: {error.strerror}") from error

    def wait_writable(self, timeout_seconds: float) -> None:
        self._writable.poll(timeout_seconds * 1000)

    def read_some(self, target: memoryview) -> int:
        try:
            nbytes = self._socket.recv_into(target)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise StreamClosedError(f"TCP: {error.strerror}") from error
        if nbytes == 0:
            raise StreamClosedError("TCP: the peer closed the connection")
        return nbytes

    def shutdown(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # not connected any more: that is what is wanted
            return

    def close(self) -> None:
        self._socket.close()
