"""What a microbatch costs: the formula of the KunServe paper (section 4.3), and its fit.

    chunk of c tokens after p computed ones
        alpha (p c + (c² + c) / 2) + kappa (p + c) + beta c + gamma
          attention                  reading KV      linear   constant
    microbatch of n chunks
        sum of the chunks' costs - (n - 1) lam, but never less than floor

`lam` (lambda) takes out of gamma what a batch pays only once. A decode is a chunk of one token.
Attention is additive when a prompt is cut, so a cut costs gamma - lam more, and reading the KV of
what is before it once more.

Two terms are ours. The paper charges a decode and a prefill alike for each pair of tokens; but a
chunk reads its KV once, however many tokens look at it, so that a decode costs eight times as much
for each pair (measured on a CPU, one thread). And while a small batch computes, the weights are
still being read: below `floor`, tokens are free.

The model is fitted at start-up from timed batches of one layer and kept in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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

    def cut(self, num_first: int) -> tuple[ChunkShape, ChunkShape]:
        """Its first `num_first` tokens, and the rest."""
        prefix, num_tokens = self
        return ChunkShape(prefix, num_first), ChunkShape(prefix + num_first, num_tokens - num_first)


class CostSample(NamedTuple):
    """One timed batch."""

    chunks: tuple[ChunkShape, ...]
    seconds: float


class PredictionError(NamedTuple):
    """How far predictions are off, relative to what was measured."""

    mean: float
    p90: float


def relative_errors(pairs: Sequence[tuple[float, float]]) -> PredictionError:
    """Of (predicted, measured) seconds, one pair or more."""
    errors = [abs(predicted - measured) / measured for predicted, measured in pairs]
    return PredictionError(float(np.mean(errors)), float(np.quantile(errors, 0.90)))


@dataclass(frozen=True, slots=True)
class CostModel:
    """Predicts the seconds that a layer takes for a batch.

    `0 <= lam <= gamma`, the others are not negative; alpha and beta are not both 0.
    """

    alpha: float
    beta: float
    gamma: float
    lam: float
    kappa: float = 0.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Raise CostModelError for numbers that no machine has."""
        numbers = (
            *(self.alpha, self.beta, self.gamma, self.lam, self.kappa, self.floor),
            self.gamma - self.lam,
        )
        if not all(math.isfinite(number) and number >= 0.0 for number in numbers):
            raise CostModelError(f"{self} is no cost model: 0 <= lam <= gamma, others >= 0")
        if self.alpha + self.beta == 0.0:
            raise CostModelError(f"{self} is no cost model: tokens must cost something")

    def marginal_cost(self, chunk: ChunkShape) -> float:
        """Seconds that a batch takes longer because of this chunk."""
        linear = self.beta * chunk.num_tokens + self.kappa * sum(chunk)
        return self.alpha * chunk.num_attended + linear + self.gamma - self.lam

    def decode_cost(self, num_prefix_tokens: int) -> float:
        """`marginal_cost` of one token after `num_prefix_tokens`."""
        attention = (self.alpha + self.kappa) * (num_prefix_tokens + 1)
        return attention + self.beta + self.gamma - self.lam

    def batch_cost(self, chunks: Iterable[ChunkShape]) -> float:
        """Seconds of a batch; 0 for an empty one."""
        costs = [self.marginal_cost(chunk) for chunk in chunks]
        return max(self.floor, math.fsum(costs) + self.lam) if costs else 0.0

    def chunk_tokens(self, num_prefix_tokens: int, marginal_seconds: float) -> float:
        """Tokens c, not rounded, for which `marginal_cost` is `marginal_seconds`; 0 if none are.

        The root of a quadratic equation, written so that it also holds for alpha = 0.
        """
        seconds = marginal_seconds - (self.gamma - self.lam) - self.kappa * num_prefix_tokens
        return self._root(num_prefix_tokens, self.beta + self.kappa, seconds)

    def even_tokens(self, chunk: ChunkShape, extra_seconds: float) -> float:
        """Where to cut `chunk`, not rounded, so that its head costs `extra_seconds` more than its
        tail; 0 if no head does not cost less.
        """
        attention = self.alpha * chunk.num_attended
        seconds = (extra_seconds + attention + (self.beta + self.kappa) * chunk.num_tokens) / 2
        return self._root(chunk.num_prefix_tokens, self.beta + self.kappa / 2, seconds)

    def _root(self, num_prefix_tokens: int, token_seconds: float, seconds: float) -> float:
        """c for which attention and `token_seconds` each are `seconds` in all."""
        if seconds <= 0.0:
            return 0.0
        linear = self.alpha * (num_prefix_tokens + 0.5) + token_seconds
        return 2.0 * seconds / (linear + math.sqrt(linear * linear + 2.0 * self.alpha * seconds))

    def prediction_error(self, samples: Sequence[CostSample]) -> PredictionError:
        """Relative error over `samples`, best over ones that the fit has not seen."""
        return relative_errors([(self.batch_cost(s.chunks), s.seconds) for s in samples])


#: Every token costs the same: what chunking by token count believes.
TOKEN_COUNT = CostModel(alpha=0.0, beta=1.0, gamma=0.0, lam=0.0)


_MIN_SAMPLES = 4
#: Batches that take less than this times the floor are not used to fit what tokens cost.
_NEAR_FLOOR = 1.3


def fit_cost_model(samples: Sequence[CostSample]) -> CostModel:
    """Least squares of relative errors, under the constraints of `CostModel`.

    Linear in (alpha, beta, kappa, gamma - lam, lam), all of them non-negative. With five unknowns
    the constrained optimum is found exactly: it is the best of the unconstrained fits of every
    subset that happen to be non-negative. The fastest sample is the floor; those near it say
    nothing about the rest.

    Raises:
        CostModelError: fewer than four samples, or one without chunks or time; or they do not show
            that tokens cost time.
    """
    if len(samples) < _MIN_SAMPLES or not all(s.chunks and s.seconds > 0.0 for s in samples):
        raise CostModelError("a cost model needs four timed batches or more, none of them empty")
    floor = min(sample.seconds for sample in samples)
    above = [sample for sample in samples if sample.seconds > _NEAR_FLOOR * floor]
    fitted = above if len(above) >= _MIN_SAMPLES else samples
    seconds = np.array([sample.seconds for sample in fitted])
    features = np.array([_features(sample.chunks) for sample in fitted]) / seconds[:, np.newaxis]
    scale = np.linalg.norm(features, axis=0)
    scale[scale == 0.0] = 1.0
    solution = _non_negative_least_squares(features / scale, np.ones(len(fitted))) / scale
    alpha, beta, kappa, per_chunk, per_batch = (float(value) for value in solution)
    return CostModel(alpha, beta, per_chunk + per_batch, per_batch, kappa, floor)


def _features(chunks: Sequence[ChunkShape]) -> tuple[float, ...]:
    return (
        math.fsum(chunk.num_attended for chunk in chunks),
        float(sum(chunk.num_tokens for chunk in chunks)),
        float(sum(map(sum, chunks))),
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
        if float(residual @ residual) < least * (1.0 - 1e-9):  # tokens first, where all is alike
            least = float(residual @ residual)
            best = np.zeros(features.shape[1])
            best[index] = values
    return best
