"""A byte stream through shared memory, between processes of one host.

One memfd holds a ring for each direction; a unix socket carries nothing but positions:

    memfd   |  ring 0: connector -> acceptor  |  ring 1: acceptor -> connector  |
    socket  | written 8 | consumed 8 |   "my ring is written up to here, yours is read up to there"

Positions are counts of bytes since the start and only rise, so the newest record says everything,
and a full socket loses nothing. Sending a record after copying orders the two on every processor,
needs no atomics, wakes the reader, and its end of file tells of a killed peer at once. The memfd
has no name and abstract sockets none on disk: after kill -9 nothing is left behind.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import Sequence

import numpy as np

from services.worker.links.base import Transport
from services.worker.links.files import create_sealed, map_sealed
from services.worker.links.stream import StreamClosedError, StreamProtocolError
from services.worker.links.tcp import set_read_tick

#: Holds an activation of 1 MiB in one piece and still fits the second-level caches.
RING_BYTES = 2 * 1024 * 1024
#: A position is told after so many bytes, so that both sides copy at the same time.
_STEP_BYTES = RING_BYTES // 8
#: Above this NumPy copies, without the GIL; below, its overhead is larger than the copy.
_NUMPY_COPY_BYTES = 32 * 1024
_RECORD = struct.Struct("<QQ")
_RECORDS_BYTES = 256 * _RECORD.size
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


def create_ring_memory() -> int:
    """A file descriptor of fresh memory for both rings, of a size that nobody can change."""
    return create_sealed("kunserve-link", 2 * RING_BYTES)


class ShmStream:
    """Two rings and the socket that tells about them; owns the socket, not `file`.

    Args:
        connection: a connected unix stream socket.
        file: from `create_ring_memory`, here or at the peer.
        is_acceptor: which ring this side writes.
    """

    transport = Transport.SHM

    def __init__(self, connection: socket.socket, file: int, is_acceptor: bool) -> None:
        # The views alone hold the mapping: it goes with the last of them.
        memory = memoryview(map_sealed(file, 2 * RING_BYTES))
        set_read_tick(connection)
        self._socket = connection
        self._tellable = select.poll()
        self._tellable.register(connection, select.POLLOUT)
        rings = memory[:RING_BYTES], memory[RING_BYTES:]
        self._outgoing, self._incoming = rings[::-1] if is_acceptor else rings
        self._written = self._peer_consumed = 0  # of the outgoing ring
        self._peer_written = self._consumed = self._told = 0  # of the incoming ring
        self._torn = b""  # the beginning of a record
        self._room = threading.Condition()
        self._waiting_for_room = self._socket_full = self._shut = False

    # --- sending ---------------------------------------------------------------------------------

    def write_some(self, pieces: Sequence[memoryview]) -> int:
        room = min(RING_BYTES - (self._written - self._peer_consumed), _STEP_BYTES)
        position = self._written
        for piece in pieces:
            part = piece[:room]
            self._copy_in(position, part)
            position += len(part)
            room -= len(part)
            if not room:
                break
        if position == self._written:
            return 0
        self._socket_full = not self._tell(position, self._consumed)
        if self._socket_full:
            return 0  # what was copied counts as not there
        nbytes = position - self._written
        self._written = position
        return nbytes

    def wait_writable(self, timeout_seconds: float) -> None:
        if self._socket_full:
            self._tellable.poll(timeout_seconds * 1000)
            return
        with self._room:
            self._waiting_for_room = True
            self._room.wait_for(self._has_room, timeout_seconds)
            self._waiting_for_room = False

    def _has_room(self) -> bool:
        return self._shut or self._written - self._peer_consumed < RING_BYTES

    def _copy_in(self, position: int, part: memoryview) -> None:
        start = position % RING_BYTES
        first = min(len(part), RING_BYTES - start)
        _copy(self._outgoing[start : start + first], part[:first])
        if first < len(part):
            _copy(self._outgoing[: len(part) - first], part[first:])

    def _tell(self, written: int, consumed: int) -> bool:
        """Send a record; False where the socket is full."""
        try:
            # A record is one small buffer of the kernel's: it goes whole or not at all.
            self._socket.send(_RECORD.pack(written, consumed), _SEND_FLAGS)
        except BlockingIOError:
            return False
        except OSError as error:
            raise StreamClosedError(f"shared memory: {error.strerror}") from error
        return True

    # --- receiving -------------------------------------------------------------------------------

    def read_some(self, target: memoryview) -> int:
        if self._peer_written == self._consumed:
            self._receive_records(0)
        elif self._waiting_for_room:
            self._receive_records(socket.MSG_DONTWAIT)
        nbytes = min(self._peer_written - self._consumed, len(target), _STEP_BYTES)
        if nbytes:
            self._copy_out(target[:nbytes])
            self._consumed += nbytes
        if self._consumed - self._told >= _STEP_BYTES:
            consumed = self._consumed
            if self._tell(self._written, consumed):
                self._told = consumed
        return nbytes

    def _copy_out(self, target: memoryview) -> None:
        start = self._consumed % RING_BYTES
        first = min(len(target), RING_BYTES - start)
        _copy(target[:first], self._incoming[start : start + first])
        if first < len(target):
            _copy(target[first:], self._incoming[: len(target) - first])

    def _receive_records(self, flags: int) -> None:
        try:
            data = self._socket.recv(_RECORDS_BYTES, flags)
        except BlockingIOError:
            return
        except OSError as error:
            raise StreamClosedError(f"shared memory: {error.strerror}") from error
        if not data:
            raise StreamClosedError("shared memory: the peer closed the connection")
        data = self._torn + data
        whole = len(data) - len(data) % _RECORD.size
        self._torn = data[whole:]
        for written, consumed in _RECORD.iter_unpack(data[:whole]):
            self._on_record(written, consumed)

    def _on_record(self, written: int, consumed: int) -> None:
        # Two threads of the peer send records, each with its own view of the other position.
        self._peer_written = max(self._peer_written, written)
        if self._peer_written - self._consumed > RING_BYTES:
            raise StreamProtocolError("the peer claims to have written more than the ring holds")
        if consumed > self._written + _STEP_BYTES:  # a step may be told before it is counted
            raise StreamProtocolError("the peer claims to have read what was never written")
        if consumed <= self._peer_consumed:
            return
        with self._room:
            self._peer_consumed = consumed
            self._room.notify()

    # --- the end ---------------------------------------------------------------------------------

    def shutdown(self) -> None:
        with self._room:
            self._shut = True
            self._room.notify()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # not connected any more: that is what is wanted
            return

    def close(self) -> None:
        self._socket.close()
        self._outgoing = self._incoming = memoryview(b"")


def _copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes between views of the same length."""
    if len(source) < _NUMPY_COPY_BYTES:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
