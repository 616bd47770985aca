"""What is asked of a device that computes by itself, in order and some time later.

    host     arrays --packed--> [ pinned buffer ]         [ pinned ] --> tokens
                                       | one copy              ^            when the mark is reached
    device                      [ views | views ] .. computes .. copies .. mark

A CPU does everything at once and needs none of this: `host.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


class Mark(Protocol):
    """A point among the things that a device was asked to do."""

    @property
    def is_reached(self) -> bool:
        """True if everything before it is done."""
        ...

    def wait(self) -> None:
        """Return when it is reached."""
        ...

    def seconds_since(self, earlier: Self) -> float:
        """How long the device took from an earlier mark to this one, both of them reached."""
        ...


@dataclass(frozen=True, slots=True)
class Fetch:
    """Tensors on their way to the host; undefined there before the mark is reached."""

    tensors: Sequence[torch.Tensor]
    mark: Mark

    def wait(self) -> Sequence[torch.Tensor]:
        """The tensors, as soon as they are here."""
        self.mark.wait()
        return self.tensors


class DeviceQueue(Protocol):
    """The order of what a device is asked to do. Engine thread only; nothing here waits."""

    def place(self, arrays: Sequence[Array]) -> list[torch.Tensor]:
        """`arrays` where the model computes, for what is asked next."""
        ...

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetch:
        """Begin to copy `tensors` to the host."""
        ...

    def mark(self) -> Mark:
        """A point behind all that was asked so far."""
        ...
