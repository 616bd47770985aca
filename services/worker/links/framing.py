"""How frames become chunks on a byte stream and whole frames again. Pure: no I/O, no clock.

A frame is its preamble, then its header and buffers as one run of payload bytes. The payload is
cut into chunks; chunks of different classes may alternate, those of one class follow in order.

    chunk   | type 1 | class 1 | preamble bytes 2 | payload bytes 4 | preamble | payload |
    FIRST   begins a frame: its preamble is msgpack [kind, group_id, epoch, [header, buffer...]]
            where the list holds lengths in bytes
    NEXT    goes on with the frame of that class, no preamble
    HEARTBEAT, GOODBYE   nothing but the eight bytes
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import msgpack
import numpy as np

from services.worker.links.base import Buffer, LinkClass, LinkError, LinkFrame
from services.worker.links.stream import StreamProtocolError

#: Larger frames are refused at both ends: a corrupt length must not exhaust the memory.
MAX_FRAME_BYTES = 1 << 30
_CHUNK_HEADER = struct.Struct("<BBHI")
_MAX_PREAMBLE_BYTES = 0xFFFF
_NUM_CLASSES = len(LinkClass)


class ChunkType(IntEnum):
    """First byte of a chunk."""

    FIRST = 1
    NEXT = 2
    HEARTBEAT = 3
    GOODBYE = 4


HEARTBEAT = _CHUNK_HEADER.pack(ChunkType.HEARTBEAT, 0, 0, 0)
GOODBYE = _CHUNK_HEADER.pack(ChunkType.GOODBYE, 0, 0, 0)


def as_bytes_view(buffer: Buffer) -> memoryview:
    """The buffer as a flat view of bytes; raises LinkError where it is not contiguous."""
    view = memoryview(buffer)
    if view.nbytes == 0:
        return memoryview(b"")
    if not view.c_contiguous:
        raise LinkError("a buffer of a frame must be C-contiguous")
    return view.cast("B")


def allocate(nbytes: int) -> memoryview:
    """Writable memory whose content is not set: np.empty does not touch the pages twice."""
    return np.empty(nbytes, dtype=np.uint8).data


def total_bytes(pieces: Sequence[memoryview]) -> int:
    """Sum of the lengths."""
    return sum(len(piece) for piece in pieces)


def skip(pieces: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """What is left of the pieces after their first `nbytes` bytes."""
    rest: list[memoryview] = []
    for piece in pieces:
        if nbytes >= len(piece):
            nbytes -= len(piece)
            continue
        rest.append(piece[nbytes:] if nbytes else piece)
        nbytes = 0
    return rest


def gather(pieces: Sequence[memoryview]) -> memoryview:
    """One copy of all pieces."""
    return memoryview(b"".join(pieces))


class FrameCutter:
    """A frame on its way out: hands its bytes out chunk by chunk, without copying them."""

    def __init__(self, frame: LinkFrame, link_class: LinkClass) -> None:
        views = [as_bytes_view(frame.header), *(as_bytes_view(b) for b in frame.buffers)]
        lengths = [len(view) for view in views]
        self.payload_bytes = sum(lengths)
        if self.payload_bytes > MAX_FRAME_BYTES:
            raise LinkError(
                f"a frame of {self.payload_bytes} bytes is over the limit of {MAX_FRAME_BYTES}"
            )
        self._preamble: bytes = msgpack.packb([frame.kind, frame.group_id, frame.epoch, lengths])
        if len(self._preamble) > _MAX_PREAMBLE_BYTES:
            raise LinkError(f"a frame of {len(frame.buffers)} buffers has too many")
        self._class = link_class
        self._rest = [view for view in views if len(view)]
        self._rest_bytes = self.payload_bytes
        self._type = ChunkType.FIRST

    @property
    def is_done(self) -> bool:
        """True when the last chunk was taken."""
        return self._type is ChunkType.NEXT and self._rest_bytes == 0

    def take(self, max_bytes: int) -> tuple[list[memoryview], int]:
        """The next chunk: its pieces and its payload bytes, `max_bytes` of them at most."""
        nbytes = min(max_bytes, self._rest_bytes)
        preamble = self._preamble if self._type is ChunkType.FIRST else b""
        head = _CHUNK_HEADER.pack(self._type, self._class, len(preamble), nbytes) + preamble
        pieces = [memoryview(head)]
        left = nbytes
        while left:
            piece = self._rest[0]
            if len(piece) > left:
                pieces.append(piece[:left])
                self._rest[0] = piece[left:]
                break
            pieces.append(self._rest.pop(0))
            left -= len(piece)
        self._type = ChunkType.NEXT
        self._rest_bytes -= nbytes
        return pieces, nbytes


@dataclass(frozen=True, slots=True)
class Arrival:
    """What the bytes received so far made complete."""

    link_class: LinkClass
    payload_bytes: int
    frame: LinkFrame | None  # None: a chunk ended, its frame goes on


class _Partial:
    """A frame of which some bytes have arrived."""

    def __init__(self, preamble: memoryview) -> None:
        try:
            kind, group_id, epoch, lengths = msgpack.unpackb(preamble)
            total = sum(lengths)
            usable = isinstance(kind, int) and isinstance(group_id, str) and isinstance(epoch, int)
            usable = usable and len(lengths) > 0 and min(lengths) >= 0 and total <= MAX_FRAME_BYTES
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
            raise StreamProtocolError(f"the preamble of a frame cannot be read: {error}") from error
        if not usable:
            raise StreamProtocolError("the preamble of a frame makes no sense")
        self._kind, self._group_id, self._epoch = kind, group_id, epoch
        self._views = [
            allocate(length) if length else memoryview(bytearray()) for length in lengths
        ]
        self._index = self._filled = 0
        self.missing_bytes = total
        self.total_bytes = total

    def target(self, max_bytes: int) -> memoryview:
        """Where the next bytes belong."""
        while self._filled == len(self._views[self._index]):
            self._index += 1
            self._filled = 0
        return self._views[self._index][self._filled : self._filled + max_bytes]

    def filled(self, nbytes: int) -> None:
        self._filled += nbytes
        self.missing_bytes -= nbytes

    def frame(self) -> LinkFrame:
        header, *buffers = self._views
        return LinkFrame(self._kind, self._group_id, self._epoch, bytes(header), buffers)


class Reassembler:
    """Turns the bytes of a stream into frames. The caller fills `target()` and says so.

    while True:
        arrival = reassembler.filled(stream.read_some(reassembler.target()))
    """

    def __init__(self) -> None:
        self._head = memoryview(bytearray(_CHUNK_HEADER.size))
        self._preamble = memoryview(bytearray(_MAX_PREAMBLE_BYTES))
        self._filled = 0  # of the head or the preamble
        self._preamble_bytes = 0
        self._class = LinkClass.CONTROL
        self._payload_left = self._payload_bytes = 0  # of the present chunk
        self._partials: list[_Partial | None] = [None] * _NUM_CLASSES
        self.said_goodbye = False

    def target(self) -> memoryview:
        """Where the next bytes of the stream belong; never empty."""
        if self._payload_left:
            partial = self._partials[self._class]
            if partial is None:
                raise StreamProtocolError("a chunk continues a frame that never began")
            return partial.target(self._payload_left)
        if self._preamble_bytes:
            return self._preamble[self._filled : self._preamble_bytes]
        return self._head[self._filled :]

    def filled(self, nbytes: int) -> Arrival | None:
        """Take note that the first `nbytes` of `target()` are there.

        Raises StreamProtocolError.
        """
        if self._payload_left:
            return self._on_payload(nbytes)
        self._filled += nbytes
        if self._preamble_bytes:
            return self._on_preamble() if self._filled == self._preamble_bytes else None
        return self._on_head() if self._filled == len(self._head) else None

    def _on_head(self) -> Arrival | None:
        kind, number, preamble_bytes, payload_bytes = _CHUNK_HEADER.unpack(self._head)
        self._filled = 0
        if kind in (ChunkType.HEARTBEAT, ChunkType.GOODBYE):
            self.said_goodbye = kind == ChunkType.GOODBYE
            return None
        if number >= _NUM_CLASSES or kind not in (ChunkType.FIRST, ChunkType.NEXT):
            raise StreamProtocolError(f"a chunk of unknown type {kind} and class {number}")
        partial = self._partials[number]
        self._class = LinkClass(number)
        self._payload_left = 0
        self._payload_bytes = payload_bytes
        if kind == ChunkType.FIRST:
            if partial is not None or not preamble_bytes:
                raise StreamProtocolError("a frame begins before the last one of its class ended")
            self._preamble_bytes = preamble_bytes
            return None
        if partial is None or preamble_bytes or not 0 < payload_bytes <= partial.missing_bytes:
            raise StreamProtocolError("a chunk does not fit the frame it continues")
        self._payload_left = payload_bytes
        return None

    def _on_preamble(self) -> Arrival | None:
        partial = _Partial(self._preamble[: self._preamble_bytes])
        self._filled = self._preamble_bytes = 0
        if self._payload_bytes > partial.missing_bytes:
            raise StreamProtocolError("a chunk is longer than its frame")
        self._partials[self._class] = partial
        self._payload_left = self._payload_bytes
        return self._finish_chunk(partial) if self._payload_left == 0 else None

    def _on_payload(self, nbytes: int) -> Arrival | None:
        partial = self._partials[self._class]
        if partial is None or nbytes > self._payload_left:
            raise StreamProtocolError("more bytes than the chunk has")
        partial.filled(nbytes)
        self._payload_left -= nbytes
        return self._finish_chunk(partial) if self._payload_left == 0 else None

    def _finish_chunk(self, partial: _Partial) -> Arrival:
        if partial.missing_bytes:
            return Arrival(self._class, self._payload_bytes, None)
        self._partials[self._class] = None
        return Arrival(self._class, self._payload_bytes, partial.frame())
