"""A worker whose group broke becomes a replica again; it computes nothing meanwhile. Engine thread.

Nobody waits for a batch, so layers are loaded as fast as they can be, with a look at the inbox now
and then.
"""

from __future__ import annotations

import time

from services.worker.model.runner import ModelRunner
from services.worker.pipeline.events import EventSink, Phase, PhaseTimed

#: Loading between two looks at the inbox.
_TURN_SECONDS = 0.02


class Reload:
    """Gets every missing layer back."""

    def __init__(self, runner: ModelRunner, emit: EventSink) -> None:
        """Begin; no KV block may be in use any more."""
        self._pieces = runner.reload()
        self._emit = emit
        self._num_bytes = 0
        self._began_at = time.perf_counter()

    def pump(self) -> bool:
        """Load for one turn; True when every layer is here."""
        ends_at = time.perf_counter() + _TURN_SECONDS
        while time.perf_counter() < ends_at:
            num_bytes = next(self._pieces, None)
            if num_bytes is None:
                seconds = time.perf_counter() - self._began_at
                self._emit(PhaseTimed(Phase.LOAD, seconds, self._num_bytes))
                return True
            self._num_bytes += num_bytes
        return False
