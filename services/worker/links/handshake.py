"""Decisions and proofs of the handshake. Pure, but for random keys.

    connector                                  acceptor
    LinkOffer        ---- bus ---->
                     <--- bus -----            LinkAnswer: link_id, key
    hello  = magic, link_id, MAC(key, "hello") ---->
                     <----  welcome = magic, MAC(key, "welcome")

Then both set up what carries tensors, over the same connection, unless that is the link itself.

On shared memory file descriptors travel along: with the welcome that of the rings; and, where both
workers share their memory, with the hello and the welcome those of the memory.

The key never travels beside the bus, and each side proves that it knows it. An invitation is good
for one connection, for some seconds, and not beyond its epoch.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from services.worker.channels.choice import ChannelOffer, ChannelPlan, choose_channels
from services.worker.links.base import LinkError, LinkPeer, Transport
from services.worker.links.messages import LinkOffer

_MAGIC = b"KSLINK01"
_ID_BYTES, _KEY_BYTES, _MAC_BYTES = 16, 32, 32
HELLO_BYTES = len(_MAGIC) + _ID_BYTES + _MAC_BYTES
WELCOME_BYTES = len(_MAGIC) + _MAC_BYTES
INVITATION_SECONDS = 10.0
#: What a peer may want for setting up a channel, at most.
_MAX_SETUP_SECONDS = 60.0
#: The one reason for TCP that is no fault.
DIFFERENT_HOSTS = "different host, network namespace or user"


class LinkRefusedError(LinkError):
    """A handshake that must not lead to a link."""


@dataclass(frozen=True, slots=True)
class TransportChoice:
    """What a link shall use; `fallback` says why it is nothing faster, "" where it is."""

    transport: Transport | None
    fallback: str


def choose_transport(
    offered: Sequence[Transport], offered_host_id: str, own: Sequence[Transport], own_host_id: str
) -> TransportChoice:
    """Shared memory where both can and it reaches, else TCP, else nothing (transport None)."""
    fallback = ""
    if not own_host_id or offered_host_id != own_host_id:
        fallback = DIFFERENT_HOSTS
    elif Transport.SHM not in own or Transport.SHM not in offered:
        fallback = "shared memory is not available to both"
    else:
        return TransportChoice(Transport.SHM, "")
    if Transport.TCP in own and Transport.TCP in offered:
        return TransportChoice(Transport.TCP, fallback)
    return TransportChoice(None, fallback)


def make_hello(link_id: bytes, key: bytes) -> bytes:
    """The connector's first bytes."""
    return _MAGIC + link_id + _mac(key, b"hello", link_id)


def make_welcome(link_id: bytes, key: bytes) -> bytes:
    """The acceptor's answer to a good hello."""
    return _MAGIC + _mac(key, b"welcome", link_id)


def check_welcome(data: bytes, link_id: bytes, key: bytes) -> None:
    """Raise LinkRefusedError unless `data` is the welcome of who holds the key."""
    if not hmac.compare_digest(data, make_welcome(link_id, key)):
        raise LinkRefusedError("what answered on the peer's address is not the peer")


def _mac(key: bytes, purpose: bytes, link_id: bytes) -> bytes:
    return hmac.digest(key, _MAGIC + purpose + link_id, hashlib.sha256)


@dataclass(frozen=True, slots=True)
class Invitation:
    """The right to connect once."""

    link_id: bytes
    key: bytes
    transport: Transport
    peer: LinkPeer
    fallback: str
    shares_memory: bool
    channel_plan: ChannelPlan
    expires_at: float


class Invitations:
    """Invitations that were given out and not redeemed yet."""

    def __init__(self) -> None:
        self._open: dict[bytes, Invitation] = {}

    def invite(
        self,
        offer: LinkOffer,
        choice: TransportChoice,
        channels: ChannelOffer,
        now: float,
        *,
        shares_memory: bool,
    ) -> Invitation:
        """Give one out. Raises LinkRefusedError where there is no transport, or no channel.

        Args:
            channels: what may carry tensors to and from this worker.
            shares_memory: this worker's memory may be read by others.
        """
        if choice.transport is None:
            raise LinkRefusedError(f"no transport that both workers can use: {choice.fallback}")
        channel_choice = choose_channels(offer.channels, channels, choice.transport)
        if not channel_choice.candidates:
            raise LinkRefusedError(f"no channel for tensors: {channel_choice.fallback}")
        self._open = {k: each for k, each in self._open.items() if each.expires_at > now}
        invitation = Invitation(
            secrets.token_bytes(_ID_BYTES),
            secrets.token_bytes(_KEY_BYTES),
            choice.transport,
            LinkPeer(offer.worker_id, offer.group_id, offer.term, offer.epoch),
            offer.fallback or choice.fallback,
            choice.transport is Transport.SHM and offer.shares_memory and shares_memory,
            ChannelPlan(
                channel_choice,
                offer.num_activations,
                min(offer.setup_seconds, _MAX_SETUP_SECONDS),
            ),
            now + INVITATION_SECONDS,
        )
        self._open[invitation.link_id] = invitation
        return invitation

    def redeem(
        self, hello: bytes, transport: Transport, now: float, current: tuple[int, int]
    ) -> Invitation:
        """Exchange a hello for its invitation, which is then used up.

        Args:
            current: the (term, epoch) this worker is at.

        Raises LinkRefusedError.
        """
        link_id = hello[len(_MAGIC) : len(_MAGIC) + _ID_BYTES]
        invitation = self._open.pop(link_id, None)
        if invitation is None or invitation.transport is not transport:
            raise LinkRefusedError("nobody was invited under that link id")
        if not hmac.compare_digest(hello, make_hello(link_id, invitation.key)):
            raise LinkRefusedError("the key of the link is wrong")
        if now >= invitation.expires_at:
            raise LinkRefusedError("the invitation has expired")
        if (invitation.peer.term, invitation.peer.epoch) < current:
            raise LinkRefusedError("the plan of the link is over")
        return invitation
