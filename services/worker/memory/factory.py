"""Which physical memory a device has."""

from __future__ import annotations

import torch

from services.worker.memory.base import PhysicalMemory
from services.worker.memory.cpu import CpuMemory
from services.worker.memory.cuda import CudaMemory
from services.worker.memory.cuda_driver import CudaDriver


def make_memory(device: torch.device, budget_bytes: int, chunk_bytes: int) -> PhysicalMemory:
    """A budget in the memory of `device`, rounded down to whole chunks.

    Raises:
        ConfigError: chunk and budget do not fit each other, or the device.
        DeviceMemoryError: the device has less memory left.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # torch makes the context that the driver's calls need
        return CudaMemory(CudaDriver(device.index or 0), budget_bytes, chunk_bytes)
    return CpuMemory(budget_bytes, chunk_bytes)
