"""From the settings to what a worker's links may carry tensors with. Engine thread, at start-up."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
import torch

from services.worker.channels.base import ChannelError, ChannelKind
from services.worker.channels.factory import ChannelFactory, TensorSizes
from services.worker.channels.nccl import NcclChannels
from services.worker.channels.nccl_library import load_nccl
from services.worker.memory.cuda_driver import CudaDriver
from services.worker.memory.cuda_ipc import CudaIpc
from services.worker.settings import LinkChannel, WorkerSettings
from shared.errors import ConfigError


def make_channel_factory(
    settings: WorkerSettings, device: torch.device, sizes: TensorSizes
) -> ChannelFactory:
    """What carries tensors between this worker and others, by device and settings.

    Raises:
        ConfigError: the settings insist on what this worker cannot do.
    """
    wanted = settings.link_channel
    if device.type == "cpu" or settings.link_bandwidth is not None:
        if wanted not in (LinkChannel.AUTO, LinkChannel.HOST):
            raise ConfigError(f"link channel {wanted} {_hindrance(device)}")
        return ChannelFactory.through_host(device)
    driver = CudaDriver(device.index or 0)
    nccl = _load_nccl(device, wanted)
    possible = [kind for kind in ChannelKind if kind is not ChannelKind.NCCL or nccl is not None]
    return ChannelFactory(
        device,
        sizes,
        _chosen(possible, wanted),
        gpu=str(torch.cuda.get_device_properties(device).uuid),
        ipc=CudaIpc(driver, lambda: int(torch.cuda.current_stream(device).cuda_stream)),
        nccl=nccl,
    )


def _hindrance(device: torch.device) -> str:
    if device.type == "cpu":
        return "needs a GPU; this worker computes on the CPU"
    return "does not go with an emulated link bandwidth, which only the host path keeps to"


def _load_nccl(device: torch.device, wanted: LinkChannel) -> NcclChannels | None:
    try:
        return NcclChannels(load_nccl(device), device)
    except ChannelError as error:
        if wanted is LinkChannel.NCCL:
            raise ConfigError(f"link channel nccl: {error}") from error
        structlog.get_logger(component="channels").warning("no NCCL", reason=str(error))
        return None


def _chosen(possible: Sequence[ChannelKind], wanted: LinkChannel) -> Sequence[ChannelKind]:
    if wanted is LinkChannel.AUTO:
        return possible
    return [ChannelKind(wanted.value)]
