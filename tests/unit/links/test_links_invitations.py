"""Who may connect, as what, over what: the pure part of the handshake."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.worker.channels.choice import ChannelOffer
from services.worker.links.base import LinkPeer, Transport
from services.worker.links.handshake import (
    HELLO_BYTES,
    INVITATION_SECONDS,
    WELCOME_BYTES,
    Invitation,
    Invitations,
    LinkRefusedError,
    TransportChoice,
    check_welcome,
    choose_transport,
    make_hello,
    make_welcome,
)
from services.worker.links.host import host_id
from services.worker.links.messages import LinkOffer

SHM, TCP = Transport
BOTH = (SHM, TCP)
OFFER = LinkOffer(
    worker_id="a", group_id="g", term=2, epoch=7, host_id="here", transports=(SHM, TCP)
)
CURRENT = (2, 7)
CHANNELS = ChannelOffer()


@pytest.mark.parametrize(
    ("offered", "offered_host", "own", "own_host", "expected"),
    [
        (BOTH, "here", BOTH, "here", SHM),
        (BOTH, "here", BOTH, "there", TCP),
        (BOTH, "", BOTH, "", TCP),  # a host that cannot be told is not the same one
        (BOTH, "here", (TCP,), "here", TCP),
        ((TCP,), "here", BOTH, "here", TCP),
        ((SHM,), "here", BOTH, "there", None),
        ((SHM,), "here", (TCP,), "here", None),
    ],
)
def test_the_fastest_transport_that_reaches_is_chosen(
    offered: tuple[Transport, ...],
    offered_host: str,
    own: tuple[Transport, ...],
    own_host: str,
    expected: Transport | None,
) -> None:
    choice = choose_transport(offered, offered_host, own, own_host)
    assert choice.transport is expected
    assert bool(choice.fallback) == (expected is not SHM)


@pytest.fixture
def invitations() -> Invitations:
    return Invitations()


@pytest.fixture
def invitation(invitations: Invitations) -> Invitation:
    return invitations.invite(
        OFFER, TransportChoice(TCP, "why"), CHANNELS, now=100.0, shares_memory=False
    )


def hello(invitation: Invitation) -> bytes:
    data = make_hello(invitation.link_id, invitation.key)
    assert len(data) == HELLO_BYTES
    return data


def test_a_good_hello_is_redeemed_once(invitations: Invitations, invitation: Invitation) -> None:
    redeemed = invitations.redeem(hello(invitation), TCP, 101.0, CURRENT)
    assert redeemed.peer == LinkPeer("a", "g", 2, 7)
    assert redeemed.fallback == "why"
    with pytest.raises(LinkRefusedError):
        invitations.redeem(hello(invitation), TCP, 101.0, CURRENT)


def test_a_wrong_key_is_refused(invitations: Invitations, invitation: Invitation) -> None:
    wrong = replace(invitation, key=bytes(32))
    with pytest.raises(LinkRefusedError, match="key"):
        invitations.redeem(hello(wrong), TCP, 101.0, CURRENT)


def test_a_wrong_transport_is_refused(invitations: Invitations, invitation: Invitation) -> None:
    with pytest.raises(LinkRefusedError):
        invitations.redeem(hello(invitation), SHM, 101.0, CURRENT)


def test_an_expired_invitation_is_refused(invitations: Invitations, invitation: Invitation) -> None:
    with pytest.raises(LinkRefusedError, match="expired"):
        invitations.redeem(hello(invitation), TCP, 100.0 + INVITATION_SECONDS, CURRENT)


@pytest.mark.parametrize("current", [(2, 8), (3, 1)])
def test_a_plan_that_is_over_is_refused(
    invitations: Invitations, invitation: Invitation, current: tuple[int, int]
) -> None:
    with pytest.raises(LinkRefusedError, match="over"):
        invitations.redeem(hello(invitation), TCP, 101.0, current)


def test_the_worker_may_be_behind_the_offer(
    invitations: Invitations, invitation: Invitation
) -> None:
    assert invitations.redeem(hello(invitation), TCP, 101.0, (2, 6))


def test_expired_invitations_are_forgotten(
    invitations: Invitations, invitation: Invitation
) -> None:
    later = 100.0 + INVITATION_SECONDS
    invitations.invite(OFFER, TransportChoice(TCP, ""), CHANNELS, later, shares_memory=False)
    with pytest.raises(LinkRefusedError, match="invited"):
        invitations.redeem(hello(invitation), TCP, 101.0, CURRENT)


@pytest.mark.parametrize("transport", Transport)
@pytest.mark.parametrize("offered", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_memory_is_shared_where_both_want_to_and_can(
    invitations: Invitations, transport: Transport, offered: bool, own: bool
) -> None:
    offer = OFFER.model_copy(update={"shares_memory": offered})
    choice = TransportChoice(transport, "")
    invitation = invitations.invite(offer, choice, CHANNELS, now=100.0, shares_memory=own)
    assert invitation.shares_memory is (transport is SHM and offered and own)


def test_the_acceptor_proves_itself_too(invitation: Invitation) -> None:
    welcome = make_welcome(invitation.link_id, invitation.key)
    assert len(welcome) == WELCOME_BYTES
    check_welcome(welcome, invitation.link_id, invitation.key)
    for wrong in (b"", welcome[:-1], bytes(WELCOME_BYTES)):
        with pytest.raises(LinkRefusedError):
            check_welcome(wrong, invitation.link_id, invitation.key)


def test_this_host_has_an_id() -> None:
    assert host_id()
    assert host_id() == host_id()
