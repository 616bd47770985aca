"""Which channels two workers try, best first. Pure.

    both on one host, shared memory between them      CUDA IPC, else NCCL, else through the host
    else                                              NCCL, else through the host

Whether the devices can really reach each other is found out by trying (`factory.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from services.worker.channels.base import ChannelKind
from services.worker.links.base import Transport
from shared.wire import WireModel


class ChannelOffer(WireModel):
    """What one worker can do; without anything said, what every worker can."""

    kinds: tuple[ChannelKind, ...] = (ChannelKind.HOST,)
    gpu: str = Field(default="", description="UUID of its GPU; empty without one")
    nccl_version: int = 0


@dataclass(frozen=True, slots=True)
class ChannelChoice:
    """What to try, in order; `fallback` says why the best for the place is not among it, or ""."""

    candidates: tuple[ChannelKind, ...]
    fallback: str


@dataclass(frozen=True, slots=True)
class ChannelPlan:
    """What one side of a link that is being opened knows of its channel.

    Args:
        num_activations: that may be on their way to this side at once.
        seconds: to set it up.
    """

    choice: ChannelChoice
    num_activations: int
    seconds: float


def choose_channels(
    offered: ChannelOffer, own: ChannelOffer, transport: Transport
) -> ChannelChoice:
    """What both can do; nothing at all where they have been told to do different things."""
    obstacles = {kind: _obstacle(kind, offered, own, transport) for kind in ChannelKind}
    candidates = tuple(kind for kind in ChannelKind if not obstacles[kind])
    if not candidates:
        reasons = "; ".join(f"{kind.value}: {obstacles[kind]}" for kind in ChannelKind)
        return ChannelChoice((), reasons)
    best = _best(offered, own, transport)
    return ChannelChoice(candidates, obstacles[best])


def _best(offered: ChannelOffer, own: ChannelOffer, transport: Transport) -> ChannelKind:
    """What would be used if nothing were in its way."""
    if not (offered.gpu and own.gpu):
        return ChannelKind.HOST
    return ChannelKind.CUDA_IPC if transport is Transport.SHM else ChannelKind.NCCL


def _obstacle(
    kind: ChannelKind, offered: ChannelOffer, own: ChannelOffer, transport: Transport
) -> str:
    """Why two workers cannot use a kind; "" where they can."""
    if kind not in own.kinds:
        return "the worker that accepts the link does not offer it"
    if kind not in offered.kinds:
        return "the worker that opens the link does not offer it"
    if kind is ChannelKind.CUDA_IPC and transport is not Transport.SHM:
        return "the workers share no memory"
    if kind is ChannelKind.NCCL and offered.gpu == own.gpu:
        return "the workers share one GPU"
    if kind is ChannelKind.NCCL and offered.nccl_version != own.nccl_version:
        return f"versions {offered.nccl_version} and {own.nccl_version} of NCCL do not mix"
    return ""
