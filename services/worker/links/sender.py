"""The sending half of a link: a priority queue, a writer thread, and a short cut past both.

    send(CONTROL) --nothing under way--> written at once, by the caller
         |   \\---something under way---> copied --\\
         \\------ bulk, borrowed ------------------> FrameQueue --chunks--> writer --> ByteStream

The right to write is one flag, held for one chunk: by the writer thread, or by a caller whose
CONTROL frame finds nothing before it. That saves waking a thread, which costs more than the copy.
The lock is held to look at the queue, never while the stream is written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from services.worker.links.base import (
    LinkClass,
    LinkDownError,
    LinkFrame,
    LinkStats,
    Transport,
)
from services.worker.links.config import LinkConfig
from services.worker.links.framing import (
    GOODBYE,
    HEARTBEAT,
    MAX_FRAME_BYTES,
    FrameCutter,
    gather,
    skip,
    total_bytes,
)
from services.worker.links.meter import LinkMeter
from services.worker.links.pacing import ChunkSizer, TokenBucket
from services.worker.links.queue import Chunk, FrameQueue
from services.worker.links.stream import ByteStream, StreamClosedError

#: Longest wait of the writer for room, so that it notices `stop`.
_WRITE_TICK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class _Work:
    """What the writer writes next; `chunk` is None for heartbeats and leftovers."""

    pieces: list[memoryview]
    chunk: Chunk | None = None


class FrameSender:
    """Sends frames on a stream, by class. `run` is the writer thread's; the rest is for anybody."""

    def __init__(self, stream: ByteStream, meter: LinkMeter, config: LinkConfig) -> None:
        self._stream = stream
        self._meter = meter
        self._heartbeat_seconds = config.heartbeat_seconds
        bandwidth = config.bandwidth_bytes_per_second
        self._sizer = ChunkSizer(config.chunk_seconds, bandwidth)
        self._bucket = TokenBucket(bandwidth) if bandwidth is not None else None
        self._state = threading.Condition()
        self._queue = FrameQueue(config.limit_bytes)
        self._leftover: list[memoryview] = []  # of a CONTROL frame the stream had no room for
        self._is_writing = False
        self._stopping = False
        self._wrote_at = time.monotonic()

    # --- any thread ------------------------------------------------------------------------------

    @property
    def is_stopped(self) -> bool:
        """True once nothing more can be sent."""
        return self._stopping

    def send_bulk(
        self, frame: LinkFrame, link_class: LinkClass, on_released: Callable[[], None] | None
    ) -> bool:
        """Queue a frame whose buffers stay borrowed; False where the class has its fill."""
        with self._state:
            self._require_running()
            accepted = self._queue.push(frame, link_class, time.monotonic(), on_released)
            if accepted:
                self._state.notify_all()
        return accepted

    def send_control(self, frame: LinkFrame) -> None:
        """Write a frame at once where nothing is in its way, else queue a copy of it."""
        with self._state:
            self._require_running()
            if self._is_busy():
                self._queue.push(_copy_of(frame), LinkClass.CONTROL, time.monotonic())
                self._state.notify_all()
                return
            cutter = FrameCutter(frame, LinkClass.CONTROL)
            self._is_writing = True
        pieces, payload_bytes = cutter.take(MAX_FRAME_BYTES)
        rest: list[memoryview] = []
        try:
            rest = self._write_what_fits(pieces)
        except StreamClosedError as error:
            self._stream.shutdown()
            raise LinkDownError("the link is down") from error
        finally:
            with self._state:
                self._leftover = [gather(rest)] if rest else []
                self._meter.control_delay(0.0)
                self._meter.sent[LinkClass.CONTROL].add(payload_bytes, ends_frame=True)
                self._is_writing = False
                if self._leftover or self._queue or self._stopping:
                    self._state.notify_all()

    def wait_writable(self, link_class: LinkClass, timeout_seconds: float) -> bool:
        """Wait until a frame would be accepted or the link is down; False where neither is."""
        with self._state:
            return self._state.wait_for(
                lambda: self._stopping or self._queue.accepts(link_class), timeout_seconds
            )

    def stats(self, transport: Transport) -> LinkStats:
        """The counters of the link, and what is queued."""
        with self._state:
            queued = {each: self._queue.queued_bytes(each) for each in LinkClass}
            measured, chunk_bytes = self._sizer.measured_bytes_per_second, self._sizer.chunk_bytes
            return self._meter.picture(transport, queued, measured, chunk_bytes)

    def stop(self) -> None:
        """Send nothing more than a goodbye. `run` returns. Idempotent."""
        with self._state:
            self._stopping = True
            self._state.notify_all()

    def wait_idle(self, timeout_seconds: float) -> bool:
        """Wait until nobody is inside the stream; False where somebody still is."""
        with self._state:
            return self._state.wait_for(lambda: not self._is_writing, timeout_seconds)

    # --- the writer thread -----------------------------------------------------------------------

    def run(self) -> None:
        """Send until stopped. Every borrowed buffer is released when this returns.

        Raises StreamClosedError.
        """
        work: _Work | None = None
        try:
            while (work := self._next_work()) is not None:
                if not self._carry_out(work):
                    return
            self._say_goodbye()
        finally:
            self._drop_all(work)

    def _next_work(self) -> _Work | None:
        """Wait for something to write and take the right to write it; None when stopped."""
        with self._state:
            while not self._stopping:
                now = time.monotonic()
                if not self._is_writing and (work := self._pick(now)) is not None:
                    self._is_writing = True
                    return work
                heartbeat_in = self._wrote_at + self._heartbeat_seconds - now
                self._state.wait(max(heartbeat_in, 0.001))
            return None

    def _pick(self, now: float) -> _Work | None:
        if self._leftover:
            return _Work(self._leftover)
        chunk = self._queue.next_chunk(self._sizer.chunk_bytes)
        if chunk is not None:
            if chunk.link_class is LinkClass.CONTROL:
                self._meter.control_delay(now - chunk.queued_at)
            return _Work(chunk.pieces, chunk)
        if now - self._wrote_at >= self._heartbeat_seconds:
            return _Work([memoryview(HEARTBEAT)])
        return None

    def _carry_out(self, work: _Work) -> bool:
        """Write it all and hand the right to write back; False where stopped before the end."""
        began_at = time.monotonic()
        if not (self._pace(total_bytes(work.pieces)) and self._write_all(work.pieces)):
            return False
        chunk = work.chunk
        with self._state:
            if chunk is None:
                self._leftover = []
            else:
                self._meter.sent[chunk.link_class].add(chunk.payload_bytes, chunk.ends_frame)
                if chunk.link_class is not LinkClass.CONTROL:
                    self._sizer.add(chunk.payload_bytes, time.monotonic() - began_at)
            self._is_writing = False
            self._state.notify_all()  # whoever waits for room
        if chunk is not None and chunk.released is not None:
            chunk.released()
        return True

    def _pace(self, nbytes: int) -> bool:
        """Wait until a link of the set bandwidth would have carried it; False when stopped."""
        if self._bucket is None:
            return True
        until = self._bucket.reserve(nbytes, time.monotonic())
        while (wait_seconds := until - time.monotonic()) > 0:
            with self._state:
                if self._state.wait_for(
                    lambda: self._stopping, min(wait_seconds, self._heartbeat_seconds)
                ):
                    return False
            if time.monotonic() - self._wrote_at >= self._heartbeat_seconds:
                self._write_all([memoryview(HEARTBEAT)])
        return True

    def _write_all(self, pieces: list[memoryview]) -> bool:
        while rest := self._write_what_fits(pieces):
            if self._stopping:
                return False
            self._stream.wait_writable(_WRITE_TICK_SECONDS)
            pieces = rest
        return True

    def _write_what_fits(self, pieces: list[memoryview]) -> list[memoryview]:
        """Write until the stream has no room; returns what is left."""
        while pieces and (nbytes := self._stream.write_some(pieces)):
            pieces = skip(pieces, nbytes)
            self._wrote_at = time.monotonic()
        return pieces

    def _say_goodbye(self) -> None:
        """Tell the peer that this end is meant, unless that would land inside a chunk."""
        with self._state:
            self._state.wait_for(lambda: not self._is_writing, _WRITE_TICK_SECONDS)
            if self._is_writing or self._leftover:
                return
        self._stream.write_some([memoryview(GOODBYE)])

    def _drop_all(self, work: _Work | None) -> None:
        with self._state:
            self._stopping = True
            released = self._queue.clear()
            self._is_writing = False
            self._state.notify_all()
        if work is not None and work.chunk is not None and work.chunk.released is not None:
            released.append(work.chunk.released)
        for call in released:
            call()

    # --- under the lock --------------------------------------------------------------------------

    def _require_running(self) -> None:
        if self._stopping:
            raise LinkDownError("the link is down")

    def _is_busy(self) -> bool:
        """Whether a CONTROL frame has to queue. A limited link is paced by the writer alone."""
        busy = self._is_writing or bool(self._leftover) or self._bucket is not None
        return busy or self._queue.holds(LinkClass.CONTROL)


def _copy_of(frame: LinkFrame) -> LinkFrame:
    return replace(frame, buffers=[bytes(buffer) for buffer in frame.buffers])
