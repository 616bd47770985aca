"""What two workers tell each other on a fresh connection, before it carries a link's frames.

    opener                                acceptor
    | length 4 | Turn | descriptors ---->
                                   <---- | length 4 | Turn | descriptors
    both have taken the step, or both know why one of them could not

Every step is taken by both at once, so that nobody goes on alone. Where the connection itself
fails, or the time is over, nothing is agreed on any more and the link is not made.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from services.worker.channels.base import ChannelError
from services.worker.links.base import LinkError
from services.worker.links.files import close_all
from shared.errors import KunserveError
from shared.wire import Message, MessageError

_LENGTH = struct.Struct("<I")
_MAX_BYTES = 1024 * 1024
_MAX_FILES = 4
#: What a step may fail with: a driver's or a library's refusal, memory, something that is missing.
_FAULTS = (KunserveError, OSError, RuntimeError, ValueError, ImportError)

Made = TypeVar("Made")


class Turn(Message):
    """One side's word on a step: what the other needs of it, or why it failed."""

    error: str = ""
    content: bytes = b""


@dataclass(frozen=True, slots=True)
class Particulars:
    """What one side gives the other in a step.

    Attributes:
        content: a message.
        files: descriptors that go with it; whoever gives them has none of them afterwards, whoever
            gets them closes them.
    """

    content: bytes = b""
    files: list[int] = field(default_factory=list)


def _nothing(_: object) -> Particulars:
    return Particulars()


class Dialogue:
    """One side of it; blocks, so it needs a thread.

    Args:
        connection: connected; unix if descriptors shall go with messages.
        seconds: for all of it.
    """

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self._ends_at = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Until nothing can be agreed on any more."""
        return self._ends_at - time.monotonic()

    def agree(
        self, step: Callable[[], Made], offer: Callable[[Made], Particulars] = _nothing
    ) -> tuple[Made, Particulars]:
        """Take a step while the peer takes its own; returns what came of the two.

        Args:
            offer: what the peer gets of what came of it here.

        Raises:
            ChannelError: one of the two steps failed, which the peer knows as well.
            LinkError: the peer is gone or silent.
        """
        try:
            made = step()
            own = offer(made)
        except _FAULTS as fault:
            reason = str(fault) or repr(fault)
            _, files = self._exchange(Turn(error=reason), [])
            close_all(files)
            raise ChannelError(reason) from fault
        theirs, files = self._exchange(Turn(content=own.content), own.files)
        if theirs.error:
            raise ChannelError(f"the peer says: {theirs.error}")
        return made, Particulars(theirs.content, files)

    def _exchange(self, own: Turn, own_files: list[int]) -> tuple[Turn, list[int]]:
        """Tell and hear; `own_files` are closed."""
        files: list[int] = []
        try:
            try:
                self._send(own.encode(), own_files)
            finally:
                close_all(own_files)
            return Turn.decode(self._receive(files)), files
        except (OSError, MessageError, LinkError) as error:
            close_all(files)
            reason = "it took too long" if isinstance(error, TimeoutError) else str(error)
            raise LinkError(f"a channel cannot be set up with the peer: {reason}") from error

    def _send(self, payload: bytes, files: list[int]) -> None:
        data = _LENGTH.pack(len(payload)) + payload
        self._connection.settimeout(max(self.seconds_left, 0.001))
        if files:
            data = data[socket.send_fds(self._connection, [data], files) :]
        if data:  # the peer may be gone as soon as it has it all
            self._connection.sendall(data)

    def _receive(self, files: list[int]) -> bytes:
        """A message; what descriptors come with it are put into `files`."""
        (nbytes,) = _LENGTH.unpack(self._read(_LENGTH.size, files))
        if nbytes > _MAX_BYTES:
            raise LinkError(f"its message of {nbytes} bytes is too long")
        return self._read(nbytes, files)

    def _read(self, nbytes: int, files: list[int]) -> bytes:
        data = b""
        while len(data) < nbytes:
            self._connection.settimeout(max(self.seconds_left, 0.001))
            part, received, _, _ = socket.recv_fds(self._connection, nbytes - len(data), _MAX_FILES)
            files += received
            if not part:
                raise LinkError("it hung up")
            data += part
        return data
