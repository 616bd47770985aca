"""Epoch fencing of what arrives on links. Pure.

group committed at epoch 5:   frames of 4 are STALE, of 5 CURRENT, of 6 AHEAD
group unknown, newest epoch 5:   frames of 5 and less are STALE, of 6 AHEAD
"""

from __future__ import annotations

from enum import Enum


class FenceVerdict(Enum):
    """What to do with a frame."""

    CURRENT = "current"
    STALE = "stale"  # discard: it belongs to a layout that is over
    AHEAD = "ahead"  # the sender has committed what this worker has not yet


class Fence:
    """Which (group, epoch) a worker is at. Epochs only rise."""

    def __init__(self) -> None:
        self._groups: dict[str, int] = {}
        self._newest = 0

    def advance(self, group_id: str, epoch: int) -> None:
        """The group is at `epoch` now; an older one than it had changes nothing."""
        self._groups[group_id] = max(epoch, self._groups.get(group_id, 0))
        self._newest = max(self._newest, epoch)

    def retire(self, group_id: str) -> None:
        """The group is over; its frames are stale up to the newest epoch known. Idempotent."""
        self._groups.pop(group_id, None)

    def judge(self, group_id: str, epoch: int) -> FenceVerdict:
        """Compare a frame with what this worker is at."""
        own = self._groups.get(group_id)
        if own is None:
            return FenceVerdict.STALE if epoch <= self._newest else FenceVerdict.AHEAD
        if epoch == own:
            return FenceVerdict.CURRENT
        return FenceVerdict.STALE if epoch < own else FenceVerdict.AHEAD
