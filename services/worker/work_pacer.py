"""How long a worker may move bytes between two batches without being slow to those it serves. Pure.

batch ........ move . batch ........ move . batch         a share of the time while batches run
batch ... wait move wait move batch ... wait move         and a little whenever none is there
wait move ... wait move ... wait move ...                 most of the time while there are none
"""

from __future__ import annotations

#: One go where no batches run: longer than the wait before it, short for a batch that comes.
_IDLE_SECONDS = 0.005
#: One go in a bubble: a piece, so that the batch that ends it hardly waits.
_BUBBLE_SECONDS = 0.0001
#: What is saved up for one go at least, about what a piece takes, and at most.
_LEAST_SECONDS = 0.0005
_MOST_SECONDS = 0.02
#: No batch for so many times as long as the last one took: there are none.
_IDLE_BATCHES = 2.0


class BatchActivity:
    """Whether batches run on a worker, by when the last one ended and how long it took.

    Attributes:
        is_running: one is being computed right now, by a device that goes on by itself.
        is_awaited: the next one is not here yet.
    """

    def __init__(self) -> None:
        self.is_running = False
        self.is_awaited = False
        self._ended_at = float("-inf")
        self._seconds = 0.0

    def ran(self, seconds: float, now: float) -> None:
        """A batch that took `seconds` is over."""
        self._ended_at = now
        self._seconds = seconds

    def is_idle(self, now: float) -> bool:
        """True if no batch runs, or has run lately."""
        return not self.is_running and now - self._ended_at > _IDLE_BATCHES * self._seconds

    @property
    def is_bubble(self) -> bool:
        """True while there is nothing to compute, here or on the device."""
        return self.is_awaited and not self.is_running


class WorkPacer:
    """Grants time for one kind of work.

    Args:
        share: of all time while batches run; work in bubbles delays nobody and is not counted.
    """

    def __init__(self, now: float, share: float, activity: BatchActivity) -> None:
        self._share = share
        self._activity = activity
        self._seen_at = now
        self._saved = 0.0  # what the share of the past comes to, less what was used
        self._is_free = False  # what was granted last

    def grant(self, now: float) -> float:
        """Seconds that may be spent from now on; 0 for none."""
        self._saved = min(self._saved + self._share * (now - self._seen_at), _MOST_SECONDS)
        self._seen_at = now
        self._is_free = self._activity.is_bubble
        if self._activity.is_idle(now):
            return _IDLE_SECONDS
        if self._is_free:
            return _BUBBLE_SECONDS
        return self._saved if self._saved >= _LEAST_SECONDS else 0.0

    def used(self, now: float) -> None:
        """What was done since `grant` is over."""
        if self._is_free:
            return
        self._saved = max(self._saved - (now - self._seen_at), -_MOST_SECONDS)
