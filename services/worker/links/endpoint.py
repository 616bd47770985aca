"""Opens links to other workers and accepts theirs: what the worker uses of this package.

open(B): LinkOffer over the bus, connect, hello, welcome --> StreamLink
offers of others: see LinkAcceptor
"""

from __future__ import annotations

import asyncio
import functools

from services.worker.channels.base import ChannelError
from services.worker.channels.choice import ChannelChoice, ChannelPlan
from services.worker.links.acceptor import LinkAcceptor
from services.worker.links.base import LinkError, LinkPeer, Transport
from services.worker.links.context import (
    Connection,
    LinkContext,
    connect_in_thread,
    make_link,
)
from services.worker.links.handshake import LinkRefusedError
from services.worker.links.link import StreamLink
from services.worker.links.listeners import connect
from services.worker.links.messages import LinkAnswer, LinkAnswerStatus, LinkOffer
from shared.bus.base import BusError
from shared.wire import MessageError

#: Of the time to open a link, for what carries tensors.
_SETUP_SHARE = 0.6


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

    async def open(
        self, peer: LinkPeer, *, num_activations: int = 0, timeout_seconds: float
    ) -> StreamLink:
        """Open a link to a worker; its threads run already.

        Args:
            num_activations: that may be on their way to that worker at once.

        Where shared memory was agreed on and fails, TCP is tried, which is logged and stays in
        the link's `fallback`.

        Raises:
            LinkRefusedError: the peer does not want this link.
            LinkError: it cannot be reached in time.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._open(peer, num_activations, timeout_seconds)
        except TimeoutError as error:
            raise LinkError(f"no link to {peer.worker_id} within {timeout_seconds:g} s") from error
        except BusError as error:
            raise LinkError(f"worker {peer.worker_id} cannot be asked: {error}") from error

    async def _open(
        self, peer: LinkPeer, num_activations: int, timeout_seconds: float
    ) -> StreamLink:
        offer = LinkOffer(
            worker_id=self._context.worker_id,
            group_id=peer.group_id,
            term=peer.term,
            epoch=peer.epoch,
            host_id=self._context.address.host_id,
            transports=self._context.address.transports,
            shares_memory=self._context.address.memory_file is not None,
            channels=self._context.channels.offer,
            num_activations=num_activations,
            setup_seconds=_SETUP_SHARE * timeout_seconds,
        )
        answer = await self._ask(peer, offer, timeout_seconds)
        try:
            connection = await self._connect(answer, offer, timeout_seconds)
        except ChannelError:
            raise  # another transport would not help
        except LinkError as error:
            if answer.transport is not Transport.SHM:
                raise
            reason = f"shared memory failed: {error}"
            offer = offer.model_copy(update={"transports": (Transport.TCP,), "fallback": reason})
            answer = await self._ask(peer, offer, timeout_seconds)
            connection = await self._connect(answer, offer, timeout_seconds)
        link = make_link(self._context, connection, peer, answer.fallback)
        link.start()
        return link

    async def _connect(
        self, answer: LinkAnswer, offer: LinkOffer, timeout_seconds: float
    ) -> Connection:
        choice = ChannelChoice(answer.channels, answer.channel_fallback)
        plan = ChannelPlan(choice, 0, offer.setup_seconds)  # activations go to the later stage
        establish = functools.partial(self._context.channels.establish, plan=plan)
        memory_file = self._context.address.memory_file
        return await connect_in_thread(
            functools.partial(connect, answer, memory_file, establish, timeout_seconds)
        )

    async def _ask(self, peer: LinkPeer, offer: LinkOffer, timeout_seconds: float) -> LinkAnswer:
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
