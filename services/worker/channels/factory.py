"""A worker's side of all its channels: what it can offer, and how it sets one up with a peer."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from services.worker.channels.base import ChannelError, ChannelKind, TensorChannel
from services.worker.channels.choice import ChannelOffer, ChannelPlan
from services.worker.channels.cuda_ipc import open_ipc_channel
from services.worker.channels.dialogue import Dialogue
from services.worker.channels.host import HostChannel
from services.worker.channels.ipc_driver import IpcDriver
from services.worker.channels.nccl import NcclChannels
from services.worker.channels.ring import RingSize, RingSizes
from services.worker.links.base import LinkClass

#: Large enough for a copy or a kernel to be worth its launch.
_BULK_SLOT_BYTES = 4 * 1024 * 1024
_EXCHANGE_SLOTS = 8
_RESTORE_SLOTS = 4
#: Slots begin at whole lines, as kernels that copy like it.
_ALIGNMENT_BYTES = 512


@dataclass(frozen=True, slots=True)
class TensorSizes:
    """What travels.

    Args:
        activation_bytes: hidden states of the largest batch.
        kv_block_bytes: one KV block of one layer.
    """

    activation_bytes: int
    kv_block_bytes: int

    def rings(self, num_activations: int) -> RingSizes:
        """Slots of what comes from a peer that may have so many activations on their way here."""
        bulk_bytes = _aligned(max(_BULK_SLOT_BYTES, self.kv_block_bytes))
        sizes = {
            LinkClass.EXCHANGE: RingSize(num_slots=_EXCHANGE_SLOTS, slot_bytes=bulk_bytes),
            LinkClass.RESTORE: RingSize(num_slots=_RESTORE_SLOTS, slot_bytes=bulk_bytes),
        }
        if num_activations:
            # One more: a slot is free a little later than what it was for has come to its end.
            sizes[LinkClass.CONTROL] = RingSize(
                num_slots=num_activations + 1, slot_bytes=_aligned(self.activation_bytes)
            )
        return sizes


@dataclass(frozen=True, slots=True)
class EstablishedChannel:
    """What two workers have agreed on; `fallback` says why it is nothing better, or ""."""

    channel: TensorChannel
    fallback: str


class ChannelFactory:
    """Makes the channels of one worker."""

    def __init__(
        self,
        device: torch.device,
        sizes: TensorSizes,
        kinds: Sequence[ChannelKind] = (ChannelKind.HOST,),
        *,
        gpu: str = "",
        ipc: IpcDriver | None = None,
        nccl: NcclChannels | None = None,
    ) -> None:
        """Offer `kinds`, for which there must be a driver and a library."""
        self._device = device
        self._sizes = sizes
        self._kinds = tuple(kinds)
        self._gpu = gpu
        self._ipc = ipc
        self._nccl = nccl

    @classmethod
    def through_host(cls, device: torch.device) -> Self:
        """What every worker can do, and no more."""
        return cls(device, TensorSizes(activation_bytes=0, kv_block_bytes=0))

    @property
    def offer(self) -> ChannelOffer:
        """What this worker can do now."""
        is_stuck = self._nccl is not None and self._nccl.is_stuck
        kinds = [kind for kind in self._kinds if kind is not ChannelKind.NCCL or not is_stuck]
        version = 0 if self._nccl is None else self._nccl.version
        return ChannelOffer(kinds=tuple(kinds), gpu=self._gpu, nccl_version=version)

    def establish(self, connection: socket.socket, plan: ChannelPlan) -> EstablishedChannel:
        """Try what the plan says with the peer, which tries the same, until both have it. Blocks.

        Args:
            connection: to the peer; nothing else may go over it meanwhile.
            plan: what to try.

        Raises:
            ChannelError: none of it can be.
            LinkError: the peer is gone.
        """
        dialogue = Dialogue(connection, plan.seconds)
        sizes = self._sizes.rings(plan.num_activations)
        reasons = [plan.choice.fallback] if plan.choice.fallback else []
        timeout = connection.gettimeout()
        try:
            for kind in plan.choice.candidates:
                try:
                    channel = self._open(kind, dialogue, sizes)
                except ChannelError as error:
                    reasons.append(f"{kind.value}: {error}")
                else:
                    return EstablishedChannel(channel, "; ".join(reasons))
            raise ChannelError(f"no channel for tensors: {'; '.join(reasons)}")
        finally:
            connection.settimeout(timeout)

    def _open(self, kind: ChannelKind, dialogue: Dialogue, sizes: RingSizes) -> TensorChannel:
        if kind is ChannelKind.CUDA_IPC and self._ipc is not None:
            return open_ipc_channel(dialogue, self._ipc, self._device, sizes)
        if kind is ChannelKind.NCCL and self._nccl is not None:
            return self._nccl.open(dialogue, sizes)
        return HostChannel(self._device)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
