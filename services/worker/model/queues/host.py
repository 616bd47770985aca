"""The CPU's queue: everything is done at once, and nothing is copied."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.worker.model.queues.base import Array, Fetch


@dataclass(frozen=True, slots=True)
class HostMark:
    """Implements `Mark`: a time on the clock of `time.perf_counter`."""

    seconds: float
    is_reached: bool = True

    def wait(self) -> None:
        """Nothing is under way."""

    def seconds_since(self, earlier: HostMark) -> float:
        """Time that has passed between them."""
        return self.seconds - earlier.seconds


class HostQueue:
    """Implements `DeviceQueue`."""

    def place(self, arrays: Sequence[Array]) -> list[torch.Tensor]:
        """The arrays themselves."""
        return on_host(arrays)

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetch:
        """The tensors themselves."""
        return Fetch(tensors, self.mark())

    def mark(self) -> HostMark:
        """Now."""
        return HostMark(time.perf_counter())


def on_host(arrays: Sequence[Array]) -> list[torch.Tensor]:
    """`arrays` as tensors, without a copy."""
    return [torch.from_numpy(array) for array in arrays]
