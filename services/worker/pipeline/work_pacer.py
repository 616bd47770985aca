"""How long a worker may load between two batches without being slow to those it serves. Pure.

batch ........ load . batch ........ load . batch         a share of the time while batches run
wait load ... wait load ... wait load ...                 most of the time while there are none
"""

from __future__ import annotations

#: Bounds of one go. Where nothing runs, the shortest go is longer than the wait before it.
_SHORTEST_SECONDS = 0.002
_LONGEST_SECONDS = 0.02
#: Two calls in a row, with no batch and no wait between them, are one occasion.
_LEAST_GAP_SECONDS = 0.0005


class WorkPacer:
    """Grants time by the time that passed since the last grant was used up.

    Args:
        share: of the time while batches are computed.
    """

    def __init__(self, now: float, share: float) -> None:
        self._ended_at = now
        self._share = share

    def grant(self, now: float) -> float:
        """Seconds that may be spent now; 0 where some were spent just before."""
        gap = now - self._ended_at
        if gap < _LEAST_GAP_SECONDS:
            return 0.0
        return min(max(gap * self._share, _SHORTEST_SECONDS), _LONGEST_SECONDS)

    def used(self, now: float) -> None:
        """The time granted is over."""
        self._ended_at = now
