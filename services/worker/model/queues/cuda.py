"""Copies between a CUDA device and the host, in the order of the engine thread's stream.

What is pinned here comes from torch's pool of such memory, so it costs nothing after a few steps.

Has never run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from services.worker.model.queues.base import Mark


class CudaMark:
    """Implements `Mark` with an event; who waits for it leaves the processor to others."""

    def __init__(self) -> None:
        event: Any = torch.cuda.Event  # untyped
        self._event = event(enable_timing=True, blocking=True)
        self._event.record()

    @property
    def is_reached(self) -> bool:
        """True if everything before it is done."""
        return bool(self._event.query())

    def wait(self) -> None:
        """Return when it is reached."""
        self._event.synchronize()

    def seconds_since(self, earlier: CudaMark) -> float:
        """How long the device took from an earlier mark to this one, both of them reached."""
        return float(earlier._event.elapsed_time(self._event)) / 1000.0


class CudaCopier:
    """Implements `Copier`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pinned(self, nbytes: int) -> torch.Tensor:  # [nbytes] uint8
        """Page-locked memory: from any other kind a copy would wait."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def upload(self, source: torch.Tensor) -> torch.Tensor:
        """A copy on the device of pinned memory, which must stay as it is until it is made."""
        return source.to(self._device, non_blocking=True)

    def download(self, source: torch.Tensor) -> torch.Tensor:
        """A copy in pinned memory, undefined until the device has made it."""
        target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        return target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        """An event, recorded now."""
        return CudaMark()
