"""What carries tensors between simulated workers: their frames, or fakes of what GPUs have."""

from __future__ import annotations

import functools
import socket
from collections import defaultdict

import torch

from services.worker.channels.base import ChannelKind, TensorChannel
from services.worker.channels.choice import ChannelChoice, ChannelPlan
from services.worker.channels.factory import ChannelFactory, EstablishedChannel, TensorSizes
from services.worker.channels.nccl import NcclChannels
from services.worker.channels.ring import RingSize, RingSizes
from services.worker.links.base import LinkClass
from tests.channel_peer import SECONDS, establish_both
from tests.fake_ipc import FakeIpcDriver
from tests.fake_nccl import Fabric, FakeNcclLibrary

CPU = torch.device("cpu")
#: Two blocks of the tiny models, so that parts are many and slots are few.
BULK_SLOT_BYTES = 32 * 1024
ACTIVATION_SLOT_BYTES = 64 * 1024


class FewSlots(TensorSizes):
    """Rings that are often full."""

    def rings(self, num_activations: int) -> RingSizes:
        sizes = {
            LinkClass.EXCHANGE: RingSize(num_slots=3, slot_bytes=BULK_SLOT_BYTES),
            LinkClass.RESTORE: RingSize(num_slots=2, slot_bytes=BULK_SLOT_BYTES),
        }
        if num_activations:
            sizes[LinkClass.CONTROL] = RingSize(
                num_slots=num_activations + 1, slot_bytes=ACTIVATION_SLOT_BYTES
            )
        return sizes


class Devices:
    """A device for each worker, all of one kind."""

    def __init__(self, kind: ChannelKind = ChannelKind.HOST) -> None:
        self.kind = kind
        self.drivers: list[FakeIpcDriver] = []
        self._fabric = Fabric()
        self._factories: defaultdict[str, ChannelFactory] = defaultdict(self._make_factory)

    def connect(
        self,
        near: str,
        far: str,
        sockets: tuple[socket.socket, socket.socket],
        num_activations: int,
    ) -> tuple[EstablishedChannel, EstablishedChannel]:
        """Both ends of a channel between two workers; activations go from `near` to `far`."""
        choice = ChannelChoice((self.kind,), "")
        plans = [ChannelPlan(choice, count, SECONDS) for count in (0, num_activations)]
        near_end, far_end = (
            functools.partial(self._factories[name].establish, plan=plan)
            for name, plan in zip((near, far), plans, strict=True)
        )
        return establish_both(near_end, far_end, sockets)

    def channels(self, near: str, far: str) -> tuple[TensorChannel, TensorChannel]:
        """The same, but for what a link knows besides; activations may go on both ways."""
        sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with sockets[0], sockets[1]:
            near_end, far_end = self.connect(near, far, sockets, 0)
        return near_end.channel, far_end.channel

    @property
    def are_idle(self) -> bool:
        """True if no memory is left of any channel."""
        return all(driver.is_idle for driver in self.drivers)

    def _make_factory(self) -> ChannelFactory:
        self.drivers.append(FakeIpcDriver())
        return ChannelFactory(
            CPU,
            FewSlots(activation_bytes=0, kv_block_bytes=0),
            [self.kind],
            ipc=self.drivers[-1],
            nccl=NcclChannels(FakeNcclLibrary(self._fabric), CPU),
        )
