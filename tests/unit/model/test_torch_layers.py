"""The layers of a CUDA worker, on whatever device there is: they compute what transformers does.

On the CPU plain torch stands in for the Triton kernels, which have tests of their own. So this
covers all the rest: packing, products, residuals, cuts, and layers that leave and come back.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.model.batch import make_batch
from services.worker.model.config import ModelConfig
from services.worker.model.layers.factory import make_decoder_layers
from shared.errors import ConfigError
from shared.layout import Span
from tests.tiny_models import ALL, MAX_MODEL_LEN, NUM_LAYERS, OTHERS, VOCAB_SIZE, TinyModels
from tests.torch_ops import TorchOps
from tests.unit.model.model_helpers import (
    BLOCK_SIZE,
    WHOLE,
    PagedSequence,
    open_runner,
    open_stage,
    random_tokens,
    run_route,
    whole_batch,
)
from tests.unit.model.request_helpers import greedy_reference, make_request, run_engine

CPU = torch.device("cpu")
FRONT, BACK = Span(start=0, end=2), Span(start=2, end=NUM_LAYERS)
#: Tokens of two sequences in each batch: a prompt, a chunk beside a prompt, decode beside decode.
STEPS = [(40, 0), (12, 29), (1, 1), (1, 1)]


@pytest.fixture
def kernels() -> TorchKernels:
    return TorchKernels(CPU, torch.float32, TorchOps())


@pytest.mark.parametrize("name", ALL)
def test_logits_are_those_of_transformers(
    name: str, tiny_models: TinyModels, kernels: TorchKernels
) -> None:
    token_ids = random_tokens(MAX_MODEL_LEN, seed=3, vocab_size=VOCAB_SIZE)
    with torch.inference_mode():
        expected = tiny_models.reference(name)(torch.tensor([token_ids])).logits[0]
    with open_stage(tiny_models.directory(name), kernels) as loaded:
        actual = run_route([(loaded.stage, WHOLE)], whole_batch(token_ids))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_chunks_and_decode_in_two_stages_give_the_logits_of_transformers(
    name: str, tiny_models: TinyModels, kernels: TorchKernels
) -> None:
    lengths = [sum(counts) for counts in zip(*STEPS, strict=True)]
    tokens = [random_tokens(length, seed=length, vocab_size=VOCAB_SIZE) for length in lengths]
    sequences = [PagedSequence(tokens[0], [7, 2, 9, 4]), PagedSequence(tokens[1], [1, 12])]
    actual: list[list[torch.Tensor]] = [[], []]
    directory = tiny_models.directory(name)
    with (
        open_stage(directory, kernels, FRONT) as front,
        open_stage(directory, kernels, BACK) as back,
    ):
        route = [(front.stage, FRONT), (back.stage, BACK)]
        for counts in STEPS:
            chosen = [i for i, count in enumerate(counts) if count]
            slices = [sequences[i].take(counts[i]) for i in chosen]
            logits = run_route(route, make_batch(slices, BLOCK_SIZE))
            for i, rows in zip(chosen, logits.split([counts[i] for i in chosen]), strict=True):
                actual[i].append(rows)
    for token_ids, rows in zip(tokens, actual, strict=True):
        with torch.inference_mode():
            expected = tiny_models.reference(name)(torch.tensor([token_ids])).logits[0]
        torch.testing.assert_close(torch.cat(rows), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modules_of_transformers_round_where_its_own_model_rounds(
    name: str, dtype: torch.dtype, tiny_models: TinyModels
) -> None:
    """Rotary embedding too, which OLMo-2 computes in fp32 and the others do not."""
    token_ids = random_tokens(40, seed=3, vocab_size=VOCAB_SIZE)
    with torch.inference_mode():
        expected = tiny_models.reference(name, dtype)(torch.tensor([token_ids])).logits[0].float()
    with open_stage(tiny_models.directory(name), TorchKernels(CPU, dtype, TorchOps())) as loaded:
        actual = run_route([(loaded.stage, WHOLE)], whole_batch(token_ids))
    error = (actual - expected).norm() / expected.norm()
    assert error < torch.finfo(dtype).eps  # the last norm is ours; OLMo-2's rounds once less


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_transformers(
    dtype: torch.dtype, tiny_models: TinyModels
) -> None:
    token_ids = random_tokens(40, seed=3, vocab_size=VOCAB_SIZE)
    with torch.inference_mode():
        expected = tiny_models.reference("llama")(torch.tensor([token_ids])).logits[0]
    kernels = TorchKernels(CPU, dtype, TorchOps())
    with open_stage(tiny_models.directory("llama"), kernels) as loaded:
        assert loaded.stage.kv_cache(0).dtype is dtype
        actual = run_route([(loaded.stage, WHOLE)], whole_batch(token_ids))
    assert actual.dtype is torch.float32
    error = (actual - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("name", ["qwen3", *OTHERS])
def test_tokens_are_those_of_transformers_through_the_engine(
    name: str, tiny_models: TinyModels, kernels: TorchKernels
) -> None:
    prompts = [random_tokens(length, seed=length, vocab_size=VOCAB_SIZE) for length in (40, 7, 90)]
    requests = [
        make_request(f"r{index}", prompt, temperature=0.0, max_tokens=12)
        for index, prompt in enumerate(prompts)
    ]
    with open_runner(tiny_models.directory(name), kernels) as runner:
        run = run_engine(runner, requests, num_blocks=32)
    model = tiny_models.reference(name)
    for request in requests:
        expected = greedy_reference(model, request)
        assert run.tokens[request.request_id][: len(expected)] == expected
        assert expected


@pytest.mark.parametrize("name", ["qwen2-tied", *OTHERS])
def test_layers_leave_and_come_back(
    name: str, tiny_models: TinyModels, kernels: TorchKernels
) -> None:
    directory, batch = tiny_models.directory(name), whole_batch(list(range(50)))
    with ExitStack() as stack:
        dropping = stack.enter_context(open_stage(directory, kernels))
        peer = stack.enter_context(open_stage(directory, kernels, BACK))
        expected = run_route([(dropping.stage, WHOLE)], batch)
        dropping.stage.drop(FRONT)
        dropping.pool.grow_kv_evenly([0, 1])
        in_two = run_route([(dropping.stage, FRONT), (peer.stage, BACK)], batch)
        dropping.pool.shrink_kv([0, 1], dropping.pool.num_kv_blocks([2, 3]))
        for _ in dropping.stage.load(WHOLE):
            pass
        restored = run_route([(dropping.stage, WHOLE)], batch)
    torch.testing.assert_close(in_two, expected)
    torch.testing.assert_close(restored, expected)


class RecordingOps(TorchOps):
    """Notes how many tokens attention is given."""

    def __init__(self) -> None:
        self.num_tokens: list[int] = []

    def attention(self, query: torch.Tensor, *others: Any) -> None:
        self.num_tokens.append(len(query))
        super().attention(query, *others)


@pytest.mark.parametrize("name", OTHERS)
def test_the_largest_batch_runs_before_anything_is_loaded(
    name: str, tiny_models: TinyModels
) -> None:
    """So there is room for what modules allocate as they go."""
    ops = RecordingOps()
    config = ModelConfig.from_directory(tiny_models.directory(name))
    make_decoder_layers(config, TorchKernels(CPU, torch.bfloat16, ops), max_num_tokens=300)
    assert ops.num_tokens == [300]


def test_a_rotary_embedding_that_changes_with_the_prompt_is_refused(
    tiny_models: TinyModels, kernels: TorchKernels
) -> None:
    raw = OTHERS["olmo2"].to_dict()
    raw["architectures"] = ["Olmo2ForCausalLM"]
    raw["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = ModelConfig.from_dict(raw, {}, where="config.json")
    with pytest.raises(ConfigError, match="'dynamic' of Olmo2ForCausalLM is not supported"):
        make_decoder_layers(config, kernels, max_num_tokens=64)
