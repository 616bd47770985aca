"""Where links are accepted, and how a connection to there is made."""

from __future__ import annotations

import os
import secrets
import socket
import struct
from collections.abc import Callable, Sequence

from services.worker.channels.factory import EstablishedChannel
from services.worker.links.base import LinkError, Transport
from services.worker.links.context import Connection
from services.worker.links.files import close_all
from services.worker.links.handshake import (
    WELCOME_BYTES,
    LinkRefusedError,
    check_welcome,
    make_hello,
)
from services.worker.links.messages import LinkAnswer
from services.worker.links.peer_memory import MappedPeerMemory, open_for_peers
from services.worker.links.shm import ShmStream
from services.worker.links.tcp import TcpStream
from shared.errors import ConfigError

_BACKLOG = 64
_CREDENTIALS = struct.Struct("3i")


def listen_tcp(host: str) -> socket.socket:
    """Listen on a free port of `host`; raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(f"links cannot listen on {host!r}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def listen_unix() -> tuple[socket.socket, str]:
    """Listen on an abstract unix socket of a random name: it has no file that could stay behind."""
    name = f"kunserve-link-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(f"\0{name}")
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise LinkError(f"no unix socket for links: {error.strerror}") from error
    return listener, name


def require_same_user(connection: socket.socket) -> None:
    """Abstract names have no permissions, so ask the kernel; raises LinkRefusedError."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    if uid != os.geteuid():
        raise LinkRefusedError(f"a process of another user (uid {uid}) connected")


#: Sets up what carries tensors, over a connection that both sides trust.
Establish = Callable[[socket.socket], EstablishedChannel]


def connect(
    answer: LinkAnswer, memory_file: int | None, establish: Establish, timeout_seconds: float
) -> Connection:
    """Connect to where `answer` says and prove the key. Blocks; meant for a thread.

    Args:
        memory_file: passed on where the answer says that both workers share their memory.

    Raises LinkError.
    """
    try:
        if answer.transport is Transport.SHM:
            return _connect_unix(answer, memory_file, establish, timeout_seconds)
        return _connect_tcp(answer, establish, timeout_seconds)
    except OSError as error:
        raise LinkError(
            f"cannot connect over {answer.transport.value}: {error.strerror or error}"
        ) from error


def _connect_tcp(answer: LinkAnswer, establish: Establish, timeout_seconds: float) -> Connection:
    connection = socket.create_connection((answer.host, answer.port), timeout_seconds)
    try:
        connection.sendall(make_hello(answer.link_id, answer.key))
        welcome = bytearray()
        while len(welcome) < WELCOME_BYTES:
            part = connection.recv(WELCOME_BYTES - len(welcome))
            if not part:
                raise LinkRefusedError("the peer refused the connection")
            welcome += part
        check_welcome(bytes(welcome), answer.link_id, answer.key)
        return Connection(TcpStream(connection), establish(connection))
    except BaseException:
        connection.close()
        raise


def _connect_unix(
    answer: LinkAnswer, memory_file: int | None, establish: Establish, timeout_seconds: float
) -> Connection:
    shared = memory_file if answer.shares_memory else None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    files: list[int] = []
    try:
        connection.settimeout(timeout_seconds)
        connection.connect(f"\0{answer.socket_name}")
        require_same_user(connection)
        send_with_files(connection, make_hello(answer.link_id, answer.key), [], shared)
        welcome, files, _, _ = socket.recv_fds(connection, WELCOME_BYTES, 2)
        if not welcome:
            raise LinkRefusedError("the peer refused the connection")
        check_welcome(welcome, answer.link_id, answer.key)
        if len(files) != (1 if shared is None else 2):
            raise LinkRefusedError("the peer's welcome came without its shared memory")
        memory = None if shared is None else MappedPeerMemory(files[1])
        stream = ShmStream(connection, files[0], is_acceptor=False)
        return Connection(stream, establish(connection), memory)
    except BaseException:
        connection.close()
        raise
    finally:
        close_all(files)


def send_with_files(
    connection: socket.socket, data: bytes, files: Sequence[int], memory_file: int | None
) -> None:
    """Send a few bytes and, with them, descriptors; that of the memory can only read."""
    shared = [] if memory_file is None else [open_for_peers(memory_file)]
    try:
        socket.send_fds(connection, [data], [*files, *shared])
    finally:
        close_all(shared)
