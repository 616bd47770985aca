"""A request's logits have the same bits whatever happens around it, and its tokens are the model's.

Alone or among neighbours, prefilled at once or in chunks of any size, undisturbed or preempted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.worker.engine.request import Request
from services.worker.kernels.cpu import CpuKernels
from services.worker.memory.errors import DeviceMemoryTooSmallError
from services.worker.model.runner import ModelRunner
from services.worker.model.sampler import SamplingRow
from shared.sampling import SamplingParams
from tests.tiny_models import ALL, VOCAB_SIZE, TinyModels, load_reference
from tests.unit.model.model_helpers import (
    BLOCK_SIZE,
    BUDGET_BYTES,
    PagedSequence,
    blocks_for,
    last_logits,
    open_runner,
    random_tokens,
)
from tests.unit.model.request_helpers import EngineRun, greedy_reference, make_request, run_engine

INVARIANCE_MODELS = ["llama", "mistral-window", "qwen3", "olmo2", "phi3-window", "smollm3"]


@pytest.fixture(scope="module", params=INVARIANCE_MODELS)
def runner(
    request: pytest.FixtureRequest, tiny_models: TinyModels, kernels: CpuKernels
) -> Iterator[ModelRunner]:
    with open_runner(tiny_models.directory(request.param), kernels) as runner:
        yield runner


def logits_alone(runner: ModelRunner, token_ids: list[int]) -> torch.Tensor:  # [vocab]
    sequence = PagedSequence(token_ids, list(range(blocks_for(len(token_ids)))))
    return last_logits(runner, [sequence.take(len(token_ids))])[0]


class Company:
    """Sequences that share batches: each with blocks of its own, scattered over the pool."""

    def __init__(self, runner: ModelRunner, lengths: Sequence[int], seed: int) -> None:
        blocks = list(range(runner.num_blocks))
        random.Random(seed).shuffle(blocks)
        self._runner = runner
        self.sequences = []
        for index, length in enumerate(lengths):
            tokens = random_tokens(length, seed + index, VOCAB_SIZE)
            table = [blocks.pop() for _ in range(blocks_for(length))]
            self.sequences.append(PagedSequence(tokens, table))

    def last_logits(self, chunks: Iterator[int], order: random.Random) -> dict[int, torch.Tensor]:
        """Compute all; logits of the last token by index of sequence, in batches of any order."""
        result: dict[int, torch.Tensor] = {}
        while not all(sequence.is_done for sequence in self.sequences):
            chosen = [i for i, sequence in enumerate(self.sequences) if not sequence.is_done]
            order.shuffle(chosen)
            slices = [self.sequences[i].take(next(chunks)) for i in chosen]
            wanted = [i for i, item in zip(chosen, slices, strict=True) if item.wants_token]
            logits = last_logits(self._runner, slices)
            result |= {i: logits[row] for row, i in enumerate(wanted)}
        return result


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=7),
    chunk_sizes=st.lists(st.integers(1, 35), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_logits_do_not_depend_on_neighbours_or_chunks(
    runner: ModelRunner, lengths: list[int], chunk_sizes: list[int], seed: int
) -> None:
    order = random.Random(seed)
    company = Company(runner, lengths, seed)
    logits = company.last_logits(iter(lambda: order.choice(chunk_sizes), None), order)
    for index, sequence in enumerate(company.sequences):
        assert torch.equal(logits[index], logits_alone(runner, sequence.token_ids))


def test_logits_do_not_depend_on_a_large_batch(runner: ModelRunner) -> None:
    """Many decodes and a long prefill chunk: the sizes at which libraries change algorithms."""
    company = Company(runner, [17] * 90 + [160], seed=5)
    firsts = [sequence.take(16) for sequence in company.sequences[:90]]
    for start in range(0, 90, 6):
        last_logits(runner, firsts[start : start + 6])
    logits = last_logits(runner, [sequence.take(160) for sequence in company.sequences])
    for row, sequence in enumerate(company.sequences):
        assert torch.equal(logits[row], logits_alone(runner, sequence.token_ids))


def requests_for_preemption(greedy: bool) -> list[Request]:
    sampling = {"temperature": 0.0} if greedy else {"temperature": 0.9, "top_p": 0.95, "seed": 7}
    return [
        make_request(
            str(index),
            random_tokens(8 + 3 * index, index, VOCAB_SIZE),
            max_tokens=50,
            ignore_eos=True,
            **sampling,
        )
        for index in range(8)
    ]


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_a_preempted_request_goes_on_as_if_nothing_had_happened(
    runner: ModelRunner, greedy: bool
) -> None:
    undisturbed = run_engine(runner, requests_for_preemption(greedy), num_blocks=64)
    disturbed = run_engine(runner, requests_for_preemption(greedy), num_blocks=12)
    assert undisturbed.num_preemptions == 0
    assert disturbed.num_preemptions >= 3
    assert disturbed.tokens == undisturbed.tokens
    assert_same_logits(disturbed, undisturbed)


def assert_same_logits(one: EngineRun, other: EngineRun) -> None:
    assert one.logits.keys() == other.logits.keys()
    for position, logits in one.logits.items():
        assert torch.equal(logits, other.logits[position])


def test_sampled_tokens_do_not_depend_on_the_batch(runner: ModelRunner) -> None:
    together = run_engine(runner, requests_for_preemption(greedy=False), num_blocks=64)
    for request in requests_for_preemption(greedy=False):
        alone = run_engine(runner, [request], num_blocks=64)
        assert alone.tokens[request.request_id] == together.tokens[request.request_id]


@pytest.mark.parametrize("name", ALL)
def test_greedy_tokens_are_those_of_generate(
    name: str, tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    directory = tiny_models.directory(name)
    requests = [
        make_request(str(n), random_tokens(n, n, VOCAB_SIZE), max_tokens=40, temperature=0.0)
        for n in (1, 2, 15, 16, 17, 40, 77)
    ]
    with open_runner(directory, kernels) as runner:
        actual = run_engine(runner, requests, num_blocks=runner.num_blocks).tokens
    num_compared = 0
    for request in requests:
        expected = greedy_reference(load_reference(directory), request)
        assert actual[request.request_id][: len(expected)] == expected
        num_compared += len(expected)
    assert num_compared > 100


def test_token_and_logits_belong_to_the_slice_that_wants_them(runner: ModelRunner) -> None:
    company = Company(runner, [20, 20, 9], seed=3)
    unfinished = company.sequences[0].take(10)
    others = [sequence.take(20) for sequence in company.sequences[1:]]
    row = SamplingRow(SamplingParams(temperature=0.0), 0, [], [])
    tokens = runner.launch([unfinished, *others], [row, row]).result()
    for token, sequence in zip(tokens, company.sequences[1:], strict=True):
        assert token.token_id == int(logits_alone(runner, sequence.token_ids).argmax())
    assert runner.launch([company.sequences[0].take(5)], []).result() == []


def test_every_sampling_parameter_reaches_the_logits(runner: ModelRunner) -> None:
    prompt = random_tokens(20, 4, VOCAB_SIZE)
    [best, second] = torch.topk(logits_alone(runner, prompt), 2).indices.tolist()

    def token(**sampling: object) -> int:
        params = SamplingParams.model_validate({"temperature": 0.0, **sampling})
        sequence = PagedSequence(prompt, [0, 1])
        row = SamplingRow(params, 20, prompt, [best])
        [sampled] = runner.launch([sequence.take(20)], [row]).result()
        return sampled.token_id

    assert token() == best
    assert token(presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=9.0) != best
    assert token(logit_bias={best: -100.0}) == second
    assert token(temperature=1.0, top_k=1, top_p=0.5, min_p=0.1, seed=3) == best


def test_a_budget_below_the_weights_is_refused(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    with (
        pytest.raises(DeviceMemoryTooSmallError, match="give at least"),
        open_runner(tiny_models.directory("llama"), kernels, memory_bytes=300_000),
    ):
        pass


def test_the_budget_bounds_the_longest_request(
    tiny_models: TinyModels, kernels: CpuKernels, tmp_path: Path
) -> None:
    with open_runner(tiny_models.directory("llama"), kernels, BUDGET_BYTES) as runner:
        assert runner.max_model_len == runner.config.max_model_len
        assert runner.num_blocks * BLOCK_SIZE >= runner.max_model_len
        usage = runner.pool.usage
        assert usage.weight_bytes + usage.kv_bytes + usage.free_bytes == runner.pool.budget_bytes
