"""Accepts the links that other workers open. Lives on the worker's event loop.

LinkOffer --> answer: an invitation --> connection with a good hello --> on_link(StreamLink)
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import time
from collections.abc import Coroutine, Sequence

import structlog

from services.worker.channels.factory import EstablishedChannel
from services.worker.links.base import LinkError, Transport
from services.worker.links.context import (
    Connection,
    LinkContext,
    connect_in_thread,
    make_link,
)
from services.worker.links.files import close_all
from services.worker.links.handshake import (
    HELLO_BYTES,
    Invitation,
    Invitations,
    LinkRefusedError,
    choose_transport,
    make_welcome,
)
from services.worker.links.listeners import (
    listen_tcp,
    listen_unix,
    require_same_user,
    send_with_files,
)
from services.worker.links.messages import LinkAnswer, LinkAnswerStatus, LinkOffer
from services.worker.links.peer_memory import MappedPeerMemory
from services.worker.links.shm import ShmStream, create_ring_memory
from services.worker.links.tcp import TcpStream
from shared.bus.base import BusMessage, Subscription

#: What a connection gets to say its hello.
_HELLO_SECONDS = 2.0
#: Connections that have not said their hello; more are closed unheard.
_MAX_GREETING = 64
_ACCEPT_RETRY_SECONDS = 0.1


class LinkAcceptor:
    """Listens, answers offers, and makes links of the connections that follow."""

    def __init__(self, context: LinkContext) -> None:
        self._context = context
        self._log = structlog.get_logger(component="links", worker=context.worker_id)
        self._invitations = Invitations()
        self._listeners: list[socket.socket] = []
        self._port = 0
        self._socket_name = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._greeting = 0
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Listen and answer offers. Raises ConfigError, LinkError or BusError."""
        context = self._context
        if Transport.TCP in context.address.transports:
            listener = listen_tcp(context.address.host)
            self._port = listener.getsockname()[1]
            self._listen(listener, Transport.TCP)
        if Transport.SHM in context.address.transports:
            listener, self._socket_name = listen_unix()
            self._listen(listener, Transport.SHM)
        self._subscription = await context.bus.subscribe(
            context.subjects.link(context.worker_id), self._on_offer
        )

    async def close(self) -> None:
        """Take no more links. Idempotent."""
        if self._subscription is not None:
            await self._subscription.unsubscribe()
            self._subscription = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    # --- offers ----------------------------------------------------------------------------------

    async def _on_offer(self, message: BusMessage) -> None:
        offer = LinkOffer.decode(message.payload)
        answer = self._answer(offer)
        if answer.status is not LinkAnswerStatus.ACCEPTED:
            self._log.warning("link.refused", peer=offer.worker_id, detail=answer.detail)
        await self._context.bus.publish(message.reply, answer.encode())

    def _answer(self, offer: LinkOffer) -> LinkAnswer:
        current = self._context.current()
        if (offer.term, offer.epoch) < current:
            return LinkAnswer(
                status=LinkAnswerStatus.STALE_EPOCH,
                detail=f"its plan {(offer.term, offer.epoch)} is older than {current}",
            )
        own = self._context.address
        choice = choose_transport(offer.transports, offer.host_id, own.transports, own.host_id)
        try:
            invitation = self._invitations.invite(
                offer,
                choice,
                self._context.channels.offer,
                time.monotonic(),
                shares_memory=own.memory_file is not None,
            )
        except LinkRefusedError as error:
            return LinkAnswer(status=LinkAnswerStatus.NO_TRANSPORT, detail=str(error))
        return LinkAnswer(
            status=LinkAnswerStatus.ACCEPTED,
            transport=invitation.transport,
            fallback=invitation.fallback,
            host=own.advertised_host,
            port=self._port,
            socket_name=self._socket_name,
            shares_memory=invitation.shares_memory,
            channels=invitation.channel_plan.choice.candidates,
            channel_fallback=invitation.channel_plan.choice.fallback,
            link_id=invitation.link_id,
            key=invitation.key,
        )

    # --- connections -----------------------------------------------------------------------------

    def _listen(self, listener: socket.socket, transport: Transport) -> None:
        self._listeners.append(listener)
        self._spawn(self._accept(listener, transport))

    async def _accept(self, listener: socket.socket, transport: Transport) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # out of file descriptors, as a rule
                self._log.error("links.cannot_accept", error=error.strerror)
                await asyncio.sleep(_ACCEPT_RETRY_SECONDS)
                continue
            if self._greeting >= _MAX_GREETING:
                connection.close()
                continue
            self._greeting += 1
            self._spawn(self._greet(connection, transport))

    async def _greet(self, connection: socket.socket, transport: Transport) -> None:
        """Make a link of a connection that says a good hello; close any other."""
        try:
            invitation, files = await self._hear(connection, transport)
            made = await connect_in_thread(
                functools.partial(self._welcome, connection, invitation, files)
            )
        except (LinkError, OSError, TimeoutError) as error:
            self._log.warning("link.refused", transport=transport.value, detail=repr(error))
            return
        finally:
            self._greeting -= 1
        if (invitation.peer.term, invitation.peer.epoch) < self._context.current():
            made.close()  # its plan has ended meanwhile
            return
        link = make_link(self._context, made, invitation.peer, invitation.fallback)
        self._context.handlers.on_link(link)
        link.start()

    async def _hear(
        self, connection: socket.socket, transport: Transport
    ) -> tuple[Invitation, list[int]]:
        """A good hello, and what descriptors came with it; else the connection is closed."""
        files: list[int] = []
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                return await self._read_hello(connection, transport, files), files
        except BaseException:
            connection.close()
            close_all(files)
            raise

    async def _read_hello(
        self, connection: socket.socket, transport: Transport, files: list[int]
    ) -> Invitation:
        """Read a hello and, into `files`, what descriptors come with it."""
        if transport is Transport.SHM:
            require_same_user(connection)
        hello = b""
        while len(hello) < HELLO_BYTES:
            await _readable(connection)
            part, received, _, _ = socket.recv_fds(connection, HELLO_BYTES - len(hello), 1)
            files += received
            if not part:
                raise LinkRefusedError("the connection ended before its hello")
            hello += part
        return self._invitations.redeem(hello, transport, time.monotonic(), self._context.current())

    def _welcome(
        self, connection: socket.socket, invitation: Invitation, files: Sequence[int]
    ) -> Connection:
        """Answer a good hello and set up what carries tensors. Blocks; runs in a thread.

        Connection and descriptors belong to it. Raises LinkError or OSError.
        """
        try:
            if invitation.transport is Transport.TCP:
                return self._welcome_tcp(connection, invitation)
            return self._welcome_unix(connection, invitation, files)
        except BaseException:
            connection.close()
            raise
        finally:
            close_all(files)

    def _welcome_tcp(self, connection: socket.socket, invitation: Invitation) -> Connection:
        connection.send(make_welcome(invitation.link_id, invitation.key))
        stream = TcpStream(connection)
        return Connection(stream, self._establish(connection, invitation))

    def _welcome_unix(
        self, connection: socket.socket, invitation: Invitation, files: Sequence[int]
    ) -> Connection:
        """The welcome brings the memory along."""
        memory, memory_file = None, None
        if invitation.shares_memory:
            if len(files) != 1:
                raise LinkRefusedError("the hello came without the peer's memory")
            memory = MappedPeerMemory(files[0])
            memory_file = self._context.address.memory_file
        rings = create_ring_memory()
        try:
            welcome = make_welcome(invitation.link_id, invitation.key)
            send_with_files(connection, welcome, [rings], memory_file)
            stream = ShmStream(connection, rings, is_acceptor=True)
        finally:
            os.close(rings)
        return Connection(stream, self._establish(connection, invitation), memory)

    def _establish(self, connection: socket.socket, invitation: Invitation) -> EstablishedChannel:
        return self._context.channels.establish(connection, invitation.channel_plan)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine, name="links")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _readable(connection: socket.socket) -> None:
    """Wait until there is something to read, or the end."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(connection)
