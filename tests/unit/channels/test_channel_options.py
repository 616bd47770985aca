"""What the settings make of a worker's channels where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from services.worker.channel_options import make_channel_factory
from services.worker.channels.base import ChannelKind
from services.worker.channels.factory import TensorSizes
from services.worker.links.base import LinkClass
from services.worker.settings import LinkChannel, WorkerSettings
from shared.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MIB = 1024**2
SIZES = TensorSizes(activation_bytes=1000, kv_block_bytes=4096)


def settings(**values: object) -> WorkerSettings:
    return WorkerSettings.model_validate({"worker_id": "w", **values})


@pytest.mark.parametrize("channel", [LinkChannel.AUTO, LinkChannel.HOST])
def test_a_cpu_worker_sends_tensors_in_frames(channel: LinkChannel) -> None:
    offer = make_channel_factory(settings(link_channel=channel), CPU, SIZES).offer
    assert (offer.kinds, offer.gpu) == ((ChannelKind.HOST,), "")


@pytest.mark.parametrize("channel", [LinkChannel.CUDA_IPC, LinkChannel.NCCL])
def test_a_cpu_worker_cannot_be_told_to_use_a_gpus_channel(channel: LinkChannel) -> None:
    with pytest.raises(ConfigError, match=f"link channel {channel} needs a GPU"):
        make_channel_factory(settings(link_channel=channel), CPU, SIZES)


def test_an_emulated_bandwidth_holds_for_tensors_too() -> None:
    limited = settings(link_bandwidth="10MiB")
    assert make_channel_factory(limited, GPU, SIZES).offer.kinds == (ChannelKind.HOST,)
    insisting = settings(link_bandwidth="10MiB", link_channel="nccl")
    with pytest.raises(ConfigError, match="emulated link bandwidth"):
        make_channel_factory(insisting, GPU, SIZES)


def test_slots_are_for_whole_parts_and_whole_batches() -> None:
    rings = SIZES.rings(num_activations=2)
    assert rings[LinkClass.CONTROL].num_slots == 3
    assert rings[LinkClass.CONTROL].slot_bytes == 1024
    assert rings[LinkClass.EXCHANGE].slot_bytes == rings[LinkClass.RESTORE].slot_bytes == 4 * MIB
    assert LinkClass.CONTROL not in SIZES.rings(num_activations=0)
    huge = TensorSizes(activation_bytes=1, kv_block_bytes=5 * MIB + 1).rings(0)
    assert huge[LinkClass.EXCHANGE].slot_bytes == 5 * MIB + 512
