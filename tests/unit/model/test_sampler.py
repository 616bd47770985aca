"""The sampler: each rule of `SamplingParams`, and that a row's draw is its own affair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.model.sampler import SamplingRow, sample, uniform
from shared.sampling import SamplingParams

VOCAB = 97


def row(position: int = 5, **params: object) -> SamplingRow:
    return SamplingRow(
        SamplingParams.model_validate(params), position, prompt_token_ids=[], output_token_ids=[]
    )


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def draw_many(logits: torch.Tensor, count: int, **params: object) -> torch.Tensor:
    """Draw `count` tokens from one row of logits, at `count` positions."""
    rows = [row(position, seed=3, **params) for position in range(count)]
    tokens = sample(logits.expand(count, VOCAB).clone(), rows)
    return torch.tensor([token.token_id for token in tokens])


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = random_logits(4)
    tokens = sample(logits.clone(), [row(temperature=0.0)] * 4)
    assert [token.token_id for token in tokens] == logits.argmax(dim=-1).tolist()


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0] + [-torch.inf] * (VOCAB - 3)])
    counts = torch.bincount(draw_many(logits, 6000), minlength=3)[:3] / 6000
    expected = torch.softmax(logits[0, :3], dim=-1)
    assert torch.allclose(counts, expected, atol=0.03)


def test_temperature_flattens_the_distribution() -> None:
    logits = torch.tensor([[0.0, 3.0] + [-torch.inf] * (VOCAB - 2)])
    counts = torch.bincount(draw_many(logits, 6000, temperature=3.0), minlength=2)[:2] / 6000
    assert torch.allclose(counts, torch.softmax(logits[0, :2] / 3.0, dim=-1), atol=0.03)


@given(st.integers(1, VOCAB), st.integers(0, 50))
@settings(max_examples=30)
def test_top_k_keeps_the_k_most_likely(top_k: int, seed: int) -> None:
    logits = random_logits(1, seed)
    allowed = set(torch.topk(logits[0], top_k).indices.tolist())
    assert set(draw_many(logits, 50, top_k=top_k).tolist()) <= allowed


@given(st.floats(0.01, 0.99), st.integers(0, 50))
@settings(max_examples=30)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, seed: int) -> None:
    logits = random_logits(1, seed)
    ordered = torch.softmax(logits[0], dim=-1).sort(descending=True)
    size = int((ordered.values.cumsum(0) < top_p).sum()) + 1
    assert set(draw_many(logits, 50, top_p=top_p).tolist()) <= set(ordered.indices[:size].tolist())


def test_min_p_drops_what_is_far_less_likely_than_the_best() -> None:
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.1] + [1e-9] * (VOCAB - 3)]))
    drawn = set(draw_many(logits, 300, min_p=0.4).tolist())
    assert drawn == {0, 1}


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = random_logits(1)
    best = int(logits.argmax())
    forbidding = SamplingRow(SamplingParams(temperature=0.0), 0, [], [], forbidden_token_ids=[best])
    assert sample(logits.clone(), [forbidding])[0].token_id == int(logits[0].topk(2).indices[1])


def test_logit_bias_adds() -> None:
    logits = random_logits(1)
    assert sample(logits, [row(temperature=0.0, logit_bias={42: 100.0})])[0].token_id == 42


@pytest.mark.parametrize(
    ("params", "prompt", "output"),
    [
        ({"presence_penalty": 2.0}, [], [7]),
        ({"frequency_penalty": 1.0}, [], [7, 7]),
        ({"repetition_penalty": 3.0}, [7], []),
        ({"repetition_penalty": 3.0}, [], [7]),
    ],
)
def test_penalties_push_used_tokens_down(
    params: dict[str, float], prompt: list[int], output: list[int]
) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8] = 3.0, 2.0
    used = SamplingRow(SamplingParams(temperature=0.0, **params), 3, prompt, output)
    unused = SamplingRow(SamplingParams(temperature=0.0, **params), 3, [], [])
    tokens = sample(logits.expand(2, VOCAB).clone(), [used, unused])
    assert [token.token_id for token in tokens] == [8, 7]


def test_presence_penalty_ignores_the_prompt() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8] = 3.0, 2.0
    params = SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    assert sample(logits, [SamplingRow(params, 3, [7, 7], [])])[0].token_id == 7


def test_logprobs_are_the_model_s_own() -> None:
    logits = random_logits(1)
    expected = torch.log_softmax(logits[0].clone(), dim=-1)
    token = sample(logits.clone(), [row(seed=1, temperature=2.0, logprobs=3)])[0]
    assert token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(float(expected[token.token_id]))
    assert list(token.logprobs.top_token_ids) == expected.topk(3).indices.tolist()
    assert token.logprobs.rank == int((expected > expected[token.token_id]).sum()) + 1


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_logits_that_are_not_numbers_still_give_a_token(
    params: dict[str, float], value: float
) -> None:
    [token] = sample(torch.full((1, VOCAB), value), [row(seed=1, **params)])
    assert 0 <= token.token_id < VOCAB


@given(st.integers(0, 2**63 - 1), st.integers(1, 12))
@settings(max_examples=40)
def test_a_row_draws_the_same_alone_and_among_others(seed: int, neighbours: int) -> None:
    logits = random_logits(neighbours + 1, seed % 1000)
    params = {"seed": seed, "temperature": 1.3, "top_p": 0.9, "top_k": 40}
    others = [row(position=i, seed=i, temperature=0.7) for i in range(neighbours)]
    alone = sample(logits[-1:].clone(), [row(**params)])
    among = sample(logits.clone(), [*others, row(**params)])
    assert among[-1] == alone[0]


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31))
def test_uniform_is_a_function_of_seed_and_position(seed: int, position: int) -> None:
    value = uniform(seed, position)
    assert 0.0 <= value < 1.0
    assert value == uniform(seed, position)
    assert value != uniform(seed, position + 1)


def test_uniform_is_uniform() -> None:
    values = torch.tensor([uniform(seed, p) for seed in range(50) for p in range(200)])
    histogram = torch.histc(values, bins=10, min=0.0, max=1.0)
    assert (histogram - 1000).abs().max() < 130
