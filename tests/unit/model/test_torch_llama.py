"""The layers of a CUDA worker, on whatever device there is: they compute what transformers does.

On the CPU plain torch stands in for the Triton kernels, which have tests of their own. So this
covers all the rest: packing, products, residuals, cuts, and layers that leave and come back.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.model.runner import ModelRunner, RunnerConfig
from shared.errors import ConfigError
from shared.layout import Span
from tests.tiny_models import LLAMA_FAMILY, MAX_MODEL_LEN, NUM_LAYERS, VOCAB_SIZE, TinyModels
from tests.torch_ops import TorchOps
from tests.unit.model.model_helpers import (
    WHOLE,
    open_runner,
    open_stage,
    random_tokens,
    run_route,
    whole_batch,
)
from tests.unit.model.request_helpers import greedy_reference, make_request, run_engine

CPU = torch.device("cpu")


@pytest.fixture
def kernels() -> TorchKernels:
    return TorchKernels(CPU, torch.float32, TorchOps())


@pytest.mark.parametrize("name", LLAMA_FAMILY)
def test_logits_are_those_of_transformers(
    name: str, tiny_models: TinyModels, kernels: TorchKernels
) -> None:
    token_ids = random_tokens(MAX_MODEL_LEN, seed=3, vocab_size=VOCAB_SIZE)
    with torch.inference_mode():
        expected = tiny_models.reference(name)(torch.tensor([token_ids])).logits[0]
    with open_stage(tiny_models.directory(name), kernels) as loaded:
        actual = run_route([(loaded.stage, WHOLE)], whole_batch(token_ids))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


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


def test_tokens_are_those_of_transformers_through_the_engine(
    tiny_models: TinyModels, kernels: TorchKernels
) -> None:
    prompts = [random_tokens(length, seed=length, vocab_size=VOCAB_SIZE) for length in (40, 7, 90)]
    requests = [
        make_request(f"r{index}", prompt, temperature=0.0, max_tokens=12)
        for index, prompt in enumerate(prompts)
    ]
    with open_runner(tiny_models.directory("qwen3"), kernels) as runner:
        run = run_engine(runner, requests, num_blocks=32)
    model = tiny_models.reference("qwen3")
    for request in requests:
        expected = greedy_reference(model, request)
        assert run.tokens[request.request_id][: len(expected)] == expected
        assert expected


def test_layers_leave_and_come_back(tiny_models: TinyModels, kernels: TorchKernels) -> None:
    directory, batch = tiny_models.directory("qwen2-tied"), whole_batch(list(range(50)))
    front, back = Span(start=0, end=2), Span(start=2, end=NUM_LAYERS)
    with ExitStack() as stack:
        dropping = stack.enter_context(open_stage(directory, kernels))
        peer = stack.enter_context(open_stage(directory, kernels, back))
        expected = run_route([(dropping.stage, WHOLE)], batch)
        dropping.stage.drop(front)
        dropping.pool.grow_kv_evenly([0, 1])
        in_two = run_route([(dropping.stage, front), (peer.stage, back)], batch)
        dropping.pool.shrink_kv([0, 1], dropping.pool.num_kv_blocks([2, 3]))
        for _ in dropping.stage.load(WHOLE):
            pass
        restored = run_route([(dropping.stage, WHOLE)], batch)
    torch.testing.assert_close(in_two, expected)
    torch.testing.assert_close(restored, expected)


def test_an_architecture_without_such_layers_is_refused_by_name(
    tiny_models: TinyModels, kernels: TorchKernels
) -> None:
    config = RunnerConfig(tiny_models.directory("phi3-window"), 8 << 20, 1 << 14, 256, None)
    with pytest.raises(ConfigError, match="Phi3ForCausalLM is served on the CPU only"):
        ModelRunner.load(config, kernels)
