"""The cost formula, its inverse, and its fit."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.cost_model import (
    TOKEN_COUNT,
    ChunkShape,
    CostModel,
    CostModelError,
    CostSample,
    fit_cost_model,
)

MODEL = CostModel(alpha=0.002, beta=1.5, gamma=9.0, lam=7.0, kappa=0.01)

shapes = st.builds(ChunkShape, st.integers(0, 4000), st.integers(1, 2000))
coefficients = st.one_of(st.just(0.0), st.floats(1e-6, 10.0))
models = st.builds(
    lambda alpha, beta, lam, extra, kappa: CostModel(alpha, beta, lam + extra, lam, kappa),
    coefficients,
    st.floats(1e-6, 10.0),
    coefficients,
    coefficients,
    coefficients,
)


def test_the_formula_of_the_paper() -> None:
    p, c = 100, 7
    expected = 0.002 * (p * c + (c * c + c) / 2) + 0.01 * (p + c) + 1.5 * c + 9.0
    assert MODEL.batch_cost([ChunkShape(p, c)]) == pytest.approx(expected)
    other = ChunkShape(0, 64)
    both = MODEL.batch_cost([ChunkShape(p, c)]) + MODEL.batch_cost([other]) - 7.0
    assert MODEL.batch_cost([ChunkShape(p, c), other]) == pytest.approx(both)
    assert MODEL.batch_cost([]) == 0.0
    assert MODEL.decode_cost(p) == pytest.approx(MODEL.marginal_cost(ChunkShape(p, 1)))


@given(models, shapes, st.data())
def test_cutting_a_chunk_costs_what_a_chunk_more_costs(
    model: CostModel, shape: ChunkShape, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, shape.num_tokens))
    head = ChunkShape(shape.num_prefix_tokens, cut)
    tail = ChunkShape(shape.num_prefix_tokens + cut, shape.num_tokens - cut)
    parts = model.marginal_cost(head) + model.marginal_cost(tail)
    cut_cost = model.gamma - model.lam + model.kappa * head.num_prefix_tokens
    whole = model.marginal_cost(shape) + cut_cost + model.kappa * head.num_tokens
    assert parts == pytest.approx(whole, rel=1e-9, abs=1e-9)


@given(models, shapes)
def test_chunk_tokens_inverts_the_cost(model: CostModel, shape: ChunkShape) -> None:
    cost = model.marginal_cost(shape)
    num_tokens = model.chunk_tokens(shape.num_prefix_tokens, cost)
    attended = num_tokens * (shape.num_prefix_tokens + (num_tokens + 1) / 2)
    fixed = model.gamma - model.lam + model.kappa * shape.num_prefix_tokens
    again = model.alpha * attended + (model.beta + model.kappa) * num_tokens + fixed
    assert again == pytest.approx(cost, rel=1e-6, abs=1e-6)
    if cost > fixed * (1 + 1e-6) + 1e-3:
        assert num_tokens == pytest.approx(shape.num_tokens, rel=1e-3)


def test_no_tokens_fit_into_less_than_the_constant() -> None:
    assert MODEL.chunk_tokens(0, 1.0) == 0.0
    assert TOKEN_COUNT.chunk_tokens(500, 64.0) == 64.0


@pytest.mark.parametrize(
    "numbers",
    [
        (-1, 1, 1, 1),
        (1, -1, 1, 1),
        (1, 1, 1, 2),
        (1, 1, 1, -1),
        (math.nan, 1, 1, 1),
        (1, math.inf, 1, 1),
        (0, 0, 1, 1),
    ],
)
def test_impossible_numbers_are_refused(numbers: tuple[float, float, float, float]) -> None:
    with pytest.raises(CostModelError):
        CostModel(*numbers)


class TestFit:
    """Least squares over timed batches."""

    def _samples(self, model: CostModel, noise: float, seed: int) -> list[CostSample]:
        random = Random(seed)
        samples = []
        for _ in range(60):
            chunks = tuple(
                ChunkShape(random.choice([0, 100, 500, 2000]), random.choice([1, 1, 16, 64, 256]))
                for _ in range(random.randint(1, 12))
            )
            seconds = model.batch_cost(chunks) * random.uniform(1 - noise, 1 + noise)
            samples.append(CostSample(chunks, seconds))
        return samples

    def test_exact_samples_give_the_model_back(self) -> None:
        fitted = fit_cost_model(self._samples(MODEL, 0.0, 1))
        for name in ("alpha", "beta", "gamma", "lam", "kappa"):
            assert getattr(fitted, name) == pytest.approx(getattr(MODEL, name), rel=1e-6)

    def test_noise_is_averaged_out_and_reported(self) -> None:
        fitted = fit_cost_model(self._samples(MODEL, 0.1, 1))
        unseen = fitted.prediction_error(self._samples(MODEL, 0.0, 2))
        assert unseen.mean < 0.03
        assert unseen.mean <= unseen.p90
        noisy = MODEL.prediction_error(self._samples(MODEL, 0.1, 3))
        assert 0.02 < noisy.mean < 0.1

    def test_a_fit_is_never_negative(self) -> None:
        """Requests that made batches faster would need a negative constant."""
        samples = [
            CostSample((ChunkShape(0, 64 // n),) * n, seconds)
            for n, seconds in [(1, 4.0), (2, 3.0), (4, 2.0), (8, 1.0)]
        ]
        fitted = fit_cost_model(samples)
        assert min(fitted.alpha, fitted.beta, fitted.lam, fitted.gamma - fitted.lam) >= 0.0

    def test_tokens_that_cost_nothing_are_refused(self) -> None:
        samples = [
            CostSample((ChunkShape(0, n),), seconds)
            for n, seconds in [(16, 4.0), (32, 3.0), (64, 2.0), (128, 1.0)]
        ]
        with pytest.raises(CostModelError, match="tokens must cost something"):
            fit_cost_model(samples)

    def test_no_other_model_nearby_fits_better(self) -> None:
        samples = self._samples(MODEL, 0.2, 5)

        def loss(model: CostModel) -> float:
            return sum((model.batch_cost(s.chunks) / s.seconds - 1) ** 2 for s in samples)

        fitted = fit_cost_model(samples)
        random = Random(7)
        for _ in range(200):
            factors = [random.uniform(0.9, 1.1) for _ in range(4)]
            lam = fitted.lam * factors[3]
            extra = (fitted.gamma - fitted.lam) * factors[2]
            alpha, beta = fitted.alpha * factors[0], fitted.beta * factors[1]
            near = CostModel(alpha, beta, lam + extra, lam, fitted.kappa * random.uniform(0.9, 1.1))
            assert loss(near) >= loss(fitted) - 1e-9

    def test_too_few_or_empty_samples_are_refused(self) -> None:
        sample = CostSample((ChunkShape(0, 1),), 1.0)
        for samples in ([sample] * 3, [sample] * 3 + [CostSample((), 1.0)]):
            with pytest.raises(CostModelError, match="four timed batches"):
                fit_cost_model(samples)


def test_below_the_floor_tokens_are_free() -> None:
    model = CostModel(0.0, 1.0, 0.0, 0.0, floor=10.0)
    assert model.batch_cost([ChunkShape(0, 3)]) == model.batch_cost([ChunkShape(0, 9)]) == 10.0
    assert model.batch_cost([ChunkShape(0, 30)]) == 30.0
    assert model.batch_cost([]) == 0.0
    shapes = [ChunkShape(p, c) for p in (0, 500) for c in (1, 2, 4, 8, 16, 32, 64, 128)]
    fitted = fit_cost_model([CostSample((s,), model.batch_cost([s])) for s in shapes])
    assert fitted.floor == 10.0
    assert fitted.beta == pytest.approx(1.0)
