"""How long a worker may load between two batches without being slow to those it serves. Pure.

batch ........ load . batch ........ load . batch         a share of the time while batches run
wait load ... wait load ... wait load ...                 most of the time while there are none
"""

from __future__ import annotations

#: Share of the time that loading may take while batches are computed.
_SHARE = 0.1
#: Bounds of one go. Where nothing runs, the shortest go is longer than the wait before it.
_SHORTEST_SECONDS = 0.002
_LONGEST_SECONDS = 0.02
#: Two calls in a row, with no batch and no wait between them, are one occasion.
_LEAST_GAP_SECONDS = 0.0005


class LoadPacer:
    """Grants time by the time that passed since the last grant was used up."""

    def __init__(self, now: float) -> None:
        self._ended_at = now

    def grant(self, now: float) -> float:
        """Seconds that may be spent loading now; 0 where it was loaded just before."""
        gap = now - self._ended_at
        if gap < _LEAST_GAP_SECONDS:
            return 0.0
        return min(max(gap * _SHARE, _SHORTEST_SECONDS), _LONGEST_SECONDS)

    def used(self, now: float) -> None:
        """The time granted is over."""
        self._ended_at = now
