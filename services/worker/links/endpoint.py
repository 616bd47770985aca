"""Opens links to other workers and accepts theirs: what the worker uses of this package.

open(B): LinkOffer over the bus, connect, hello, welcome --> StreamLink
offers of others: see LinkAcceptor
"""

from __future__ import annotations

import asyncio

from services.worker.links.acceptor import LinkAcceptor
from services.worker.links.base import LinkError, LinkPeer, Transport
from services.worker.links.context import Connection, LinkContext, make_link
from services.worker.links.handshake import LinkRefusedError
from services.worker.links.link import StreamLink
from services.worker.links.listeners import connect
from services.worker.links.messages import LinkAnswer, LinkAnswerStatus, LinkOffer
from shared.bus.base import BusError
from shared.wire import MessageError


class LinkEndpoint:
    """A worker's side of all handshakes. Lives on the worker's event loop."""

    def __init__(self, context: LinkContext) -> None:
        self._context = context
        self._acceptor = LinkAcceptor(context)

    async def start(self) -> None:
        """Accept links from now on. Raises ConfigError, LinkError or BusError."""
        await self._acceptor.start()

    async def close(self) -> None:
        """Take no more links; those that are up belong to their owners. Idempotent."""
        await self._acceptor.close()

    async def open(self, peer: LinkPeer, *, timeout_seconds: float) -> StreamLink:
        """Open a link to a worker; its threads run already.

        Where shared memory was agreed on and fails, TCP is tried, which is logged and stays in
        the link's `fallback`.

        Raises:
            LinkRefusedError: the peer does not want this link.
            LinkError: it cannot be reached in time.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._open(peer, timeout_seconds)
        except TimeoutError as error:
            raise LinkError(f"no link to {peer.worker_id} within {timeout_seconds:g} s") from error
        except BusError as error:
            raise LinkError(f"worker {peer.worker_id} cannot be asked: {error}") from error

    async def _open(self, peer: LinkPeer, timeout_seconds: float) -> StreamLink:
        answer = await self._offer(peer, self._context.address.transports, "", timeout_seconds)
        try:
            connection = await self._connect(answer, timeout_seconds)
        except LinkError as error:
            if answer.transport is not Transport.SHM:
                raise
            reason = f"shared memory failed: {error}"
            answer = await self._offer(peer, (Transport.TCP,), reason, timeout_seconds)
            connection = await self._connect(answer, timeout_seconds)
        link = make_link(self._context, connection, peer, answer.fallback)
        link.start()
        return link

    async def _connect(self, answer: LinkAnswer, timeout_seconds: float) -> Connection:
        memory_file = self._context.address.memory_file
        return await asyncio.to_thread(connect, answer, memory_file, timeout_seconds)

    async def _offer(
        self,
        peer: LinkPeer,
        transports: tuple[Transport, ...],
        fallback: str,
        timeout_seconds: float,
    ) -> LinkAnswer:
        offer = LinkOffer(
            worker_id=self._context.worker_id,
            group_id=peer.group_id,
            term=peer.term,
            epoch=peer.epoch,
            host_id=self._context.address.host_id,
            transports=transports,
            fallback=fallback,
            shares_memory=self._context.address.memory_file is not None,
        )
        payload = await self._context.bus.request(
            self._context.subjects.link(peer.worker_id),
            offer.encode(),
            timeout_seconds=timeout_seconds,
        )
        try:
            answer = LinkAnswer.decode(payload)
        except MessageError as error:
            raise LinkError(f"worker {peer.worker_id} answered nonsense: {error}") from error
        if answer.status is not LinkAnswerStatus.ACCEPTED:
            raise LinkRefusedError(f"worker {peer.worker_id} refused a link: {answer.detail}")
        return answer
