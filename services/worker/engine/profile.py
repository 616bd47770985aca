"""What computing costs on one worker, as a short profile at start-up found. Pure.

    seconds of a stage = layers x layer(batch) + embedding(tokens) + head(rows)
                                                 stage 0             last stage

The layer's cost model paces microbatches; with the two ends it says what slices of the model cost.
`services/worker/model/profiler.py` measures it, `services/worker/profile_cache.py` keeps it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from services.worker.engine.cost_model import CostModel, CostModelError, PredictionError


@dataclass(frozen=True, slots=True)
class LinearCost:
    """What some rows cost: a part paid once, and a part for each row."""

    fixed_seconds: float
    row_seconds: float

    def __post_init__(self) -> None:
        """Raise CostModelError for numbers that no machine has."""
        numbers = (self.fixed_seconds, self.row_seconds)
        if not all(math.isfinite(number) and number >= 0.0 for number in numbers):
            raise CostModelError(f"{self} is no cost: both must be 0 or more")

    def seconds(self, num_rows: int) -> float:
        """Of `num_rows` rows; 0 for none."""
        return self.fixed_seconds + self.row_seconds * num_rows if num_rows else 0.0

    @classmethod
    def through(cls, few: tuple[int, float], many: tuple[int, float]) -> LinearCost:
        """The line through two measurements (rows, seconds), as far as it is a cost."""
        row_seconds = max(0.0, (many[1] - few[1]) / (many[0] - few[0]))
        return cls(max(0.0, few[1] - row_seconds * few[0]), row_seconds)


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """Costs of the parts of a model.

    Attributes:
        layer: of one decoder layer.
        embedding: by tokens.
        head: final norm, LM head and sampling, by rows that want a token.
        fit_error: of `layer`, over the batches it was fitted to.
    """

    layer: CostModel
    embedding: LinearCost
    head: LinearCost
    fit_error: PredictionError

    def to_json(self) -> str:
        """For the cache."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelProfile:
        """Read what `to_json` wrote; CostModelError if it did not."""
        try:
            fields = json.loads(text)
            return cls(
                layer=CostModel(**_floats(fields["layer"])),
                embedding=LinearCost(**_floats(fields["embedding"])),
                head=LinearCost(**_floats(fields["head"])),
                fit_error=PredictionError(*_float_list(fields["fit_error"])),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CostModelError(f"this is not a profile: {text[:100]!r}") from error


def _floats(fields: dict[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in fields.items()}


def _float_list(values: Sequence[float]) -> list[float]:
    return [float(value) for value in values]
