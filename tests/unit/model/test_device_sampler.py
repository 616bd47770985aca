"""A GPU's sampler draws what the CPU's draws; each rule of theirs is tested there."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from services.worker.model.device_sampler import DeviceSampler
from services.worker.model.queues.factory import make_queue
from services.worker.model.queues.staged import StagedQueue
from services.worker.model.sampler import SampledToken, SamplingRow, sample
from shared.sampling import SamplingParams
from tests.late_copier import LateCopier

VOCAB = 203
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SAMPLING: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3, "top_k": 7},
    {"temperature": 1.7, "top_k": VOCAB},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 1.2, "min_p": 0.1},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.0, "repetition_penalty": 2.0, "presence_penalty": 1.0},
    {"temperature": 1.0, "frequency_penalty": 0.5, "logit_bias": {3: 4.0, 9: -100.0}},
]


def rows_of(position: int) -> list[SamplingRow]:
    """A row for each way of sampling."""
    return [
        SamplingRow(
            SamplingParams.model_validate({"seed": 31 * index + position, **params}),
            position,
            prompt_token_ids=[1, 2, 3],
            output_token_ids=[3, 3, 50],
            forbidden_token_ids=[0],
        )
        for index, params in enumerate(SAMPLING)
    ]


def random_logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def sample_on_device(
    logits: torch.Tensor,
    rows: list[SamplingRow],
    source_ids: torch.Tensor | None = None,
    num_parts: int = 1,
) -> list[SampledToken]:
    sampler = DeviceSampler(make_queue(DEVICE), VOCAB)
    size = -(-len(rows) // num_parts)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    pending = sampler.launch(logits.to(DEVICE, copy=True).split(size), parts, source_ids)
    tokens = pending.result()
    assert pending.token_ids.tolist() == [token.token_id for token in tokens]
    return tokens


def both(
    logits: torch.Tensor, rows: list[SamplingRow]
) -> tuple[list[SampledToken], list[SampledToken]]:
    return sample_on_device(logits, rows), sample(logits.clone(), rows)


@pytest.mark.parametrize("position", range(40))
def test_a_mixed_batch_draws_the_same_tokens(position: int) -> None:
    actual, expected = both(random_logits(len(SAMPLING), position), rows_of(position))
    assert actual == expected


@pytest.mark.parametrize("index", range(len(SAMPLING)))
def test_a_row_alone_draws_what_it_draws_among_others(index: int) -> None:
    logits, rows = random_logits(len(SAMPLING), seed=7), rows_of(7)
    among = sample_on_device(logits, rows)
    alone = sample_on_device(logits[index : index + 1], [rows[index]])
    assert alone == [among[index]]


def test_logprobs_are_reported_for_the_rows_that_ask() -> None:
    params = [SamplingParams(temperature=0.0, logprobs=count) for count in (None, 0, 3)]
    rows = [SamplingRow(one, 5, [1], [2]) for one in params]
    actual, expected = both(random_logits(3, seed=1), rows)
    for one, other in zip(actual, expected, strict=True):
        assert one.token_id == other.token_id
        assert (one.logprobs is None) == (other.logprobs is None)
        if one.logprobs is not None and other.logprobs is not None:
            assert one.logprobs.top_token_ids == other.logprobs.top_token_ids
            assert one.logprobs.rank == other.logprobs.rank
            assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-5)


@pytest.mark.parametrize("position", range(10))
def test_an_unknown_token_counts_as_if_it_were_known(position: int) -> None:
    """For every penalty, whether it was there before or not; it is known on the device only."""
    rng = random.Random(position)
    source_ids = torch.tensor([3, 50, 77, 4], device=DEVICE)
    unknown, known = [], []
    for row in rows_of(position):
        source_row = rng.choice([None, 0, 1, 2, 3])
        unknown.append(replace(row, source_row=source_row))
        last = [] if source_row is None else [int(source_ids[source_row])]
        known.append(replace(row, output_token_ids=[*row.output_token_ids, *last]))
    logits = random_logits(len(SAMPLING), position)
    actual = sample_on_device(logits, unknown, source_ids)
    assert actual == sample_on_device(logits, known)
    assert actual == sample(logits.clone(), known)


def test_parts_are_sampled_as_if_they_were_one() -> None:
    rows = [
        replace(row, params=row.params.model_copy(update={"logprobs": index % 4 or None}))
        for index, row in enumerate(rows_of(2))
    ]
    logits = random_logits(len(rows), seed=2)
    expected = sample_on_device(logits, rows)
    for num_parts in (2, 3, len(rows)):
        assert sample_on_device(logits, rows, num_parts=num_parts) == expected


def test_nothing_is_known_on_the_host_before_it_was_waited_for() -> None:
    rows = [
        replace(row, params=row.params.model_copy(update={"logprobs": 2})) for row in rows_of(1)
    ]
    logits, copier = random_logits(len(rows), seed=1), LateCopier()
    sampler = DeviceSampler(StagedQueue(copier), VOCAB)
    pending = sampler.launch([logits.clone()], [rows], None)
    assert not pending.is_ready
    assert copier.num_uploads == 1
    assert pending.result() == sample_on_device(logits, rows)
    assert pending.is_ready


def test_a_batch_without_rows_is_waited_for_too() -> None:
    pending = DeviceSampler(StagedQueue(LateCopier()), VOCAB).launch([], [], None)
    assert not pending.is_ready
    assert pending.token_ids.shape == (0,)
    assert pending.result() == []


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_logits_that_are_not_numbers_still_give_a_token(value: float) -> None:
    rows = [row for row in rows_of(3) if not row.params.logit_bias]
    for token in sample_on_device(torch.full((len(rows), VOCAB), value), rows):
        assert 0 <= token.token_id < VOCAB
