"""A link over a byte stream: a thread that sends, a thread that receives, and how they end.

close() --> sender stops, says goodbye --> writer thread shuts the stream down
peer gone, silent, or wrong ----------------------------------> receive thread ends
                          on_down (unless closed here), joins the writer, frees the stream

Whatever carries tensors beside the frames is aborted when the receive thread ends, and closed by
`close`, as its owner may be using it until then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from services.worker.links.base import (
    DownHandler,
    DownReason,
    FrameHandler,
    LinkClass,
    LinkError,
    LinkFrame,
    LinkPeer,
    LinkStats,
    PeerMemory,
    Transport,
)
from services.worker.links.config import LinkConfig
from services.worker.links.meter import LinkMeter
from services.worker.links.receiver import FrameReceiver
from services.worker.links.sender import FrameSender
from services.worker.links.stream import ByteStream, StreamClosedError, StreamError

if TYPE_CHECKING:  # a link itself needs no torch
    from services.worker.channels.base import TensorChannel
    from services.worker.channels.factory import EstablishedChannel


class StreamLink:
    """A `Link`. Its threads run from `start` on.

    Args:
        stream: connected; the link owns it.
        peer: who is at the other end, as the handshake found.
        fallback: why it is not a faster transport, "" where it is the fastest.
        peer_memory: the peer's, where both may read each other's.
        tensors: what carries tensors; None on a link that carries none. The link owns it.
    """

    def __init__(
        self,
        stream: ByteStream,
        peer: LinkPeer,
        config: LinkConfig,
        on_frame: FrameHandler,
        on_down: DownHandler,
        fallback: str = "",
        peer_memory: PeerMemory | None = None,
        tensors: EstablishedChannel | None = None,
    ) -> None:
        self._stream = stream
        self._peer = peer
        self._fallback = fallback
        self._peer_memory = peer_memory
        self._tensors = tensors
        self._close_seconds = config.close_seconds
        self._on_frame = on_frame
        self._on_down = on_down
        self._log = structlog.get_logger(component="link", peer=peer.worker_id)
        self._closed_here = False
        self._fault: DownReason | None = None
        meter = LinkMeter()
        self._sender = FrameSender(stream, meter, config)
        self._receiver = FrameReceiver(stream, meter, config.silence_seconds)
        name = f"link {peer.worker_id}"
        self._writer = threading.Thread(target=self._write, name=f"{name} out", daemon=True)
        self._reader = threading.Thread(target=self._read, name=f"{name} in", daemon=True)

    @property
    def peer(self) -> LinkPeer:
        return self._peer

    @property
    def transport(self) -> Transport:
        return self._stream.transport

    @property
    def fallback(self) -> str:
        """Why the link does not use a faster transport, "" where it uses the fastest."""
        return self._fallback

    @property
    def peer_memory(self) -> PeerMemory | None:
        return self._peer_memory

    @property
    def channel(self) -> TensorChannel:
        if self._tensors is None:
            raise LinkError("this link carries no tensors")
        return self._tensors.channel

    @property
    def is_up(self) -> bool:
        return not self._sender.is_stopped

    def start(self) -> None:
        """Begin to send and receive."""
        self._writer.start()
        self._reader.start()

    def send(
        self,
        frame: LinkFrame,
        link_class: LinkClass,
        on_released: Callable[[], None] | None = None,
    ) -> bool:
        if link_class is not LinkClass.CONTROL:
            return self._sender.send_bulk(frame, link_class, on_released)
        self._sender.send_control(frame)
        if on_released is not None:
            on_released()
        return True

    def wait_writable(self, link_class: LinkClass, timeout_seconds: float) -> bool:
        return self._sender.wait_writable(link_class, timeout_seconds)

    def stats(self) -> LinkStats:
        stats = self._sender.stats(self.transport)
        if self._tensors is None:
            return stats
        channel, fallback = self._tensors.channel, self._tensors.fallback
        return replace(
            stats, channel=channel.kind, channel_fallback=fallback, tensors=channel.traffic()
        )

    def close(self) -> None:
        self._end_threads()
        if self._tensors is not None:
            self._tensors.channel.close()

    def _end_threads(self) -> None:
        self._closed_here = True
        self._sender.stop()
        if self._reader.ident is None:  # never started
            self._stream.shutdown()
            self._stream.close()
            return
        if threading.current_thread() in (self._writer, self._reader):
            return  # inside a callback: the receive thread ends once that has returned
        self._reader.join(self._close_seconds)
        if self._reader.is_alive():
            self._log.error("link.callback_does_not_return", transport=self.transport.value)

    # --- threads ---------------------------------------------------------------------------------

    def _write(self) -> None:
        try:
            self._sender.run()
        except StreamClosedError:
            pass  # the receive thread sees the end of the stream too, and what came before it
        except Exception:
            self._fault = DownReason.FAULT
            self._log.exception("link.writer_failed")
        finally:
            self._stream.shutdown()

    def _read(self) -> None:
        reason, detail = DownReason.FAULT, ""
        try:
            for frame in self._receiver.frames():
                if self._closed_here:
                    break
                self._on_frame(self, frame)
        except StreamError as error:
            reason, detail = error.reason, str(error)
        except Exception:
            self._log.exception("link.receiver_failed")
        self._sender.stop()
        if self._tensors is not None:
            self._tensors.channel.abort()
        if not self._closed_here:
            self._tell_down(self._fault or reason, detail)
        self._free()

    def _tell_down(self, reason: DownReason, detail: str) -> None:
        say = self._log.info if reason is DownReason.CLOSED_BY_PEER else self._log.warning
        say("link.down", transport=self.transport.value, reason=reason.value, detail=detail)
        try:
            self._on_down(self, reason)
        except Exception:
            self._log.exception("link.on_down_failed")

    def _free(self) -> None:
        self._peer_memory = None  # a dead peer's memory is the system's again without it
        self._stream.shutdown()
        self._writer.join(self._close_seconds)
        if not self._writer.is_alive() and self._sender.wait_idle(self._close_seconds):
            self._stream.close()
        else:
            self._log.error("link.callback_does_not_return", transport=self.transport.value)
