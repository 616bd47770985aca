"""Which channels two workers try: a table."""

from __future__ import annotations

import pytest

from services.worker.channels.base import ChannelKind
from services.worker.channels.choice import ChannelOffer, choose_channels
from services.worker.links.base import Transport

CUDA_IPC, NCCL, HOST = ChannelKind
SHM, TCP = Transport
CPU = ChannelOffer()
GPU_A = ChannelOffer(kinds=(CUDA_IPC, NCCL, HOST), gpu="a", nccl_version=22809)
GPU_B = GPU_A.model_copy(update={"gpu": "b"})
OTHER_NCCL = GPU_B.model_copy(update={"nccl_version": 22705})
NO_NCCL = ChannelOffer(kinds=(CUDA_IPC, HOST), gpu="b")
ONLY_HOST = ChannelOffer(kinds=(HOST,), gpu="b")
ONLY_IPC = ChannelOffer(kinds=(CUDA_IPC,), gpu="b")
ONLY_NCCL = ChannelOffer(kinds=(NCCL,), gpu="b", nccl_version=22809)


@pytest.mark.parametrize(
    ("offered", "own", "transport", "expected", "fallback"),
    [
        (CPU, CPU, SHM, (HOST,), ""),
        (CPU, GPU_A, SHM, (HOST,), ""),
        (GPU_A, CPU, TCP, (HOST,), ""),
        (GPU_A, GPU_B, SHM, (CUDA_IPC, NCCL, HOST), ""),
        (GPU_A, GPU_B, TCP, (NCCL, HOST), ""),
        (GPU_A, GPU_A, SHM, (CUDA_IPC, HOST), ""),  # NCCL wants a GPU for each rank
        (GPU_A, GPU_A, TCP, (HOST,), "one GPU"),
        (GPU_A, OTHER_NCCL, SHM, (CUDA_IPC, HOST), ""),
        (GPU_A, OTHER_NCCL, TCP, (HOST,), "22809 and 22705"),
        (GPU_A, NO_NCCL, TCP, (HOST,), "accepts the link does not offer it"),
        (NO_NCCL, GPU_A, TCP, (HOST,), "opens the link does not offer it"),
        (GPU_A, ONLY_HOST, SHM, (HOST,), "does not offer it"),
        (ONLY_IPC, GPU_A, SHM, (CUDA_IPC,), ""),
        (ONLY_IPC, GPU_A, TCP, (), "cuda_ipc: the workers share no memory"),
        (ONLY_NCCL, GPU_A, SHM, (NCCL,), "does not offer it"),
        (ONLY_NCCL, ONLY_IPC, SHM, (), "does not offer it"),
        (ONLY_NCCL, CPU, TCP, (), "does not offer it"),
    ],
)
def test_the_best_that_both_can_do_comes_first(
    offered: ChannelOffer,
    own: ChannelOffer,
    transport: Transport,
    expected: tuple[ChannelKind, ...],
    fallback: str,
) -> None:
    choice = choose_channels(offered, own, transport)
    assert choice.candidates == expected
    assert fallback in choice.fallback
    assert bool(choice.fallback) == bool(fallback)
