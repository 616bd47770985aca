"""What a microbatch costs: the formula of the KunServe paper (section 4.3), and its fit.

    chunk of c tokens after p computed ones    alpha (p c + (c² + c) / 2) + beta c + gamma
                                                  attention                 linear   constant
    microbatch of n chunks                     sum of the chunks' costs - (n - 1) lam

`lam` (lambda) takes out of gamma what a batch pays only once, such as reading the weights. A decode
is a chunk of one token. Attention is additive when a prompt is cut, so a cut costs gamma - lam more
and nothing else.

The model is fitted at start-up from timed batches of one stage and kept in the cache as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.errors import KunserveError


class CostModelError(KunserveError):
    """A cost model cannot be fitted or read."""


class ChunkShape(NamedTuple):
    """`num_tokens` tokens of a request that are computed after its first `num_prefix_tokens`."""

    num_prefix_tokens: int
    num_tokens: int

    @property
    def num_attended(self) -> float:
        """Pairs of tokens that attention looks at."""
        return (
            self.num_prefix_tokens * self.num_tokens + self.num_tokens * (self.num_tokens + 1) / 2
        )


class CostSample(NamedTuple):
    """One timed batch."""

    chunks: tuple[ChunkShape, ...]
    seconds: float


class PredictionError(NamedTuple):
    """How far predictions are off, relative to what was measured."""

    mean: float
    p95: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """Predicts the seconds that one stage takes for a batch.

    `0 <= lam <= gamma`, `alpha >= 0`, `beta >= 0`, not both 0.
    """

    alpha: float
    beta: float
    gamma: float
    lam: float

    def __post_init__(self) -> None:
        """Raise CostModelError for numbers that no machine has."""
        numbers = (self.alpha, self.beta, self.gamma, self.lam, self.gamma - self.lam)
        if not all(math.isfinite(number) and number >= 0.0 for number in numbers):
            raise CostModelError(f"{self} is no cost model: 0 <= lam <= gamma, others >= 0")
        if self.alpha + self.beta == 0.0:
            raise CostModelError(f"{self} is no cost model: tokens must cost something")

    def chunk_cost(self, chunk: ChunkShape) -> float:
        """Seconds of a batch that is this chunk alone."""
        return self.marginal_cost(chunk) + self.lam

    def marginal_cost(self, chunk: ChunkShape) -> float:
        """Seconds that a batch takes longer because of this chunk."""
        linear = self.beta * chunk.num_tokens
        return self.alpha * chunk.num_attended + linear + self.gamma - self.lam

    def decode_cost(self, num_prefix_tokens: int) -> float:
        """`marginal_cost` of one token after `num_prefix_tokens`."""
        return self.alpha * (num_prefix_tokens + 1) + self.beta + self.gamma - self.lam

    def batch_cost(self, chunks: Iterable[ChunkShape]) -> float:
        """Seconds of a batch; 0 for an empty one."""
        costs = [self.marginal_cost(chunk) for chunk in chunks]
        return math.fsum(costs) + self.lam if costs else 0.0

    def chunk_tokens(self, num_prefix_tokens: int, marginal_seconds: float) -> float:
        """Tokens c, not rounded, for which `marginal_cost` is `marginal_seconds`; 0 if none are.

        The root of a quadratic equation, written so that it also holds for alpha = 0.
        """
        seconds = marginal_seconds - (self.gamma - self.lam)
        if seconds <= 0.0:
            return 0.0
        linear = self.alpha * (num_prefix_tokens + 0.5) + self.beta
        return 2.0 * seconds / (linear + math.sqrt(linear * linear + 2.0 * self.alpha * seconds))

    def prediction_error(self, samples: Sequence[CostSample]) -> PredictionError:
        """Relative error over `samples`, best over ones that the fit has not seen."""
        errors = [abs(self.batch_cost(s.chunks) - s.seconds) / s.seconds for s in samples]
        return PredictionError(float(np.mean(errors)), float(np.quantile(errors, 0.95)))

    def to_json(self) -> str:
        """For the cache."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """Read what `to_json` wrote; CostModelError if it did not."""
        try:
            fields = json.loads(text)
            return cls(**{name: float(fields[name]) for name in cls.__slots__})
        except (ValueError, TypeError, KeyError) as error:
            raise CostModelError(f"this is not a cost model: {text[:100]!r}") from error


#: Every token costs the same: what chunking by token count believes.
TOKEN_COUNT = CostModel(alpha=0.0, beta=1.0, gamma=0.0, lam=0.0)


def fit_cost_model(samples: Sequence[CostSample]) -> CostModel:
    """Least squares of relative errors, under the constraints of `CostModel`.

    Linear in (alpha, beta, gamma - lam, lam), all of them non-negative. With four unknowns the
    constrained optimum is found exactly: it is the best of the unconstrained fits of every subset
    that happen to be non-negative.

    Raises:
        CostModelError: fewer than four samples, or one without chunks or time; or they do not show
            that tokens cost time.
    """
    if len(samples) < 4 or not all(s.chunks and s.seconds > 0.0 for s in samples):
        raise CostModelError("a cost model needs four timed batches or more, none of them empty")
    seconds = np.array([sample.seconds for sample in samples])
    features = np.array([_features(sample.chunks) for sample in samples]) / seconds[:, np.newaxis]
    scale = np.linalg.norm(features, axis=0)
    scale[scale == 0.0] = 1.0
    solution = _non_negative_least_squares(features / scale, np.ones(len(samples))) / scale
    alpha, beta, per_chunk, per_batch = (float(value) for value in solution)
    return CostModel(alpha, beta, gamma=per_chunk + per_batch, lam=per_batch)


def _features(chunks: Sequence[ChunkShape]) -> tuple[float, float, float, float]:
    return (
        math.fsum(chunk.num_attended for chunk in chunks),
        float(sum(chunk.num_tokens for chunk in chunks)),
        float(len(chunks)),
        1.0,
    )


def _non_negative_least_squares(
    features: NDArray[np.float64], target: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The x >= 0 with the least |features x - target|; features is [num_samples, num_unknowns]."""
    columns = range(features.shape[1])
    best, least = np.zeros(features.shape[1]), float(target @ target)
    for subset in chain.from_iterable(combinations(columns, n) for n in range(1, len(columns) + 1)):
        index = list(subset)
        values = np.linalg.lstsq(features[:, index], target, rcond=None)[0]
        if (values < 0.0).any():
            continue
        residual = features[:, index] @ values - target
        if float(residual @ residual) < least:
            least = float(residual @ residual)
            best = np.zeros(features.shape[1])
            best[index] = values
    return best
