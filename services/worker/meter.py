"""Where the time of a worker's engine thread goes, and whether its cost model is right. Pure.

    | busy ........ | bubble | busy ........ |      idle       | busy
      a batch         waits for the next one   nobody has work

A bubble is time in which a stage of a pipeline waits although the leader has requests. The leader
sees that for itself; another stage learns it with its next batch, which says whether the leader's
requests ever ran out before. A replica has none: it waits for nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from services.worker.engine.cost_model import (
    ChunkShape,
    CostModel,
    PredictionError,
    relative_errors,
)


class BatchTiming(NamedTuple):
    """What the layers of a batch took, and what the cost model said."""

    predicted_seconds: float
    measured_seconds: float


class MeterReading(NamedTuple):
    """Attributes:
    busy_seconds, bubble_seconds: as a stage of pipelines, since the worker started.
    timings: of the batches since the reading before.
    """

    busy_seconds: float = 0.0
    bubble_seconds: float = 0.0
    timings: tuple[BatchTiming, ...] = ()


class EngineMeter:
    """Counts the time of one engine thread, which alone uses it.

    Attributes:
        layer: predicts batches, once the model is profiled.
    """

    def __init__(self) -> None:
        self.layer: CostModel | None = None
        self._busy = self._bubble = self._gap = 0.0
        self._ran_dry = True
        self._timings: list[BatchTiming] = []

    def read(self) -> MeterReading:
        """The sums so far, and the batches since the last reading."""
        timings = tuple(self._timings)
        self._timings.clear()
        return MeterReading(self._busy, self._bubble, timings)

    def waited(self, seconds: float, *, leads_work: bool, is_computing: bool = False) -> None:
        """A stage's thread had nothing to do.

        Args:
            leads_work: it is a leader that has requests.
            is_computing: its device had: then the stage did not wait.
        """
        if is_computing:
            self._busy += seconds
        elif leads_work:
            self._bubble += seconds
        else:
            self._gap += seconds
            self._ran_dry = True

    def worked(self, seconds: float) -> None:
        """A stage did something."""
        self._busy += seconds

    def batch_sent(self) -> bool:
        """A leader sends a batch down the chain; whether it had work ever since the one before."""
        ran_dry, self._ran_dry = self._ran_dry, False
        return not ran_dry

    def batch_arrived(self, *, follows: bool) -> None:
        """A leader's batch is here. `follows`: its requests never ran out since the one before."""
        if follows:
            self._bubble += self._gap
        self._gap = 0.0

    def computed(self, chunks: Sequence[ChunkShape], num_layers: int, seconds: float) -> None:
        """Some layers of a batch took `seconds`."""
        if self.layer is not None:
            predicted = num_layers * self.layer.batch_cost(chunks)
            self._timings.append(BatchTiming(predicted, seconds))


class PredictionWindow:
    """How far the cost model is off over the last batches.

    What else runs on a machine makes everything slower alike, which harms no division into equal
    parts. So errors are those that remain when predictions are scaled to the measured total.
    """

    def __init__(self, num_batches: int = 512) -> None:
        self._timings: deque[BatchTiming] = deque(maxlen=num_batches)

    def add(self, timings: Iterable[BatchTiming]) -> None:
        """Take in newer batches."""
        self._timings.extend(timings)

    @property
    def scale(self) -> float:
        """Measured over predicted time; 1 if nothing was measured."""
        predicted = sum(timing.predicted_seconds for timing in self._timings)
        measured = sum(timing.measured_seconds for timing in self._timings)
        return measured / predicted if predicted else 1.0

    def error(self) -> PredictionError | None:
        """None if nothing was measured."""
        if not self._timings:
            return None
        scale = self.scale
        return relative_errors([(t[0] * scale, t[1]) for t in self._timings])
