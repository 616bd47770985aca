"""Which queue a device has."""

from __future__ import annotations

import torch

from services.worker.model.queues.base import DeviceQueue
from services.worker.model.queues.cuda import CudaCopier
from services.worker.model.queues.host import HostQueue
from services.worker.model.queues.staged import StagedQueue


def make_queue(device: torch.device) -> DeviceQueue:
    """The queue of `device`."""
    return StagedQueue(CudaCopier(device)) if device.type == "cuda" else HostQueue()
