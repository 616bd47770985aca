"""Tells how long the phases of a drop took on this worker, each once."""

from __future__ import annotations

import time

from services.worker.pipeline.events import EventSink, Phase, PhaseTimed


class PhaseTimer:
    """Runs from a commit on. Engine thread only."""

    def __init__(self, emit: EventSink) -> None:
        self._emit = emit
        self._began_at = self._last_at = time.perf_counter()
        self._over: set[Phase] = set()

    def next_over(self, phase: Phase) -> None:
        """A phase is over that began with the end of the last one given here, or the commit."""
        if phase not in self._over:
            self.over(phase, began_at=self._last_at)
            self._last_at = time.perf_counter()

    def over(self, phase: Phase, num_bytes: int = 0, began_at: float | None = None) -> None:
        """The phase is over; nothing happens where that was said before.

        Args:
            began_at: on the clock of `time.perf_counter`; None: with the commit.
        """
        if phase not in self._over:
            self._over.add(phase)
            since = self._began_at if began_at is None else began_at
            self._emit(PhaseTimed(phase, time.perf_counter() - since, num_bytes))
