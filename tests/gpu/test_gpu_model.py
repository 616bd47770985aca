"""A worker's model on a real GPU: its memory, its tokens, and a drop. None of it has run yet.

The memory's contract (`tests/contract/test_memory.py`), the kernels (`tests/unit/kernels/
test_kernels_triton.py`) and the sampler run on the GPU too where there is one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.memory.factory import make_memory
from services.worker.memory.pool import MemoryPool
from services.worker.memory.tensors import tensor_at
from services.worker.model.batch import UNKNOWN_TOKEN, SequenceSlice
from services.worker.model.loading import RunnerConfig
from services.worker.model.runner import ModelRunner
from services.worker.model.sampler import SamplingRow
from shared.layout import Span
from shared.sampling import SamplingParams
from tests.tiny_models import ALL, NUM_LAYERS, OTHERS, VOCAB_SIZE, TinyModels
from tests.unit.model.model_helpers import (
    MAX_NUM_TOKENS,
    PagedSequence,
    last_logits,
    random_tokens,
)
from tests.unit.model.request_helpers import greedy_reference, make_request, run_engine
from tests.unit.model.test_overlap import SAMPLINGS, serve

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
CHUNK_BYTES = 2 * 1024**2
BUDGET_BYTES = 64 * CHUNK_BYTES
PROMPTS = [random_tokens(length, seed=length, vocab_size=VOCAB_SIZE) for length in (40, 7, 90)]


@contextmanager
def open_gpu_runner(
    tiny_models: TinyModels, name: str, dtype: torch.dtype = torch.float32
) -> Iterator[ModelRunner]:
    from services.worker.kernels.cuda.ops import TritonOps

    kernels = TorchKernels(DEVICE, dtype, TritonOps())
    config = RunnerConfig(
        tiny_models.directory(name), BUDGET_BYTES, CHUNK_BYTES, MAX_NUM_TOKENS, None
    )
    runner = ModelRunner.load(config, kernels)
    yield runner
    runner.pool.check_integrity()
    runner.close()


def test_tensors_stay_good_when_their_memory_leaves_and_comes_back() -> None:
    pool = MemoryPool(make_memory(DEVICE, BUDGET_BYTES, CHUNK_BYTES))
    arena = pool.weight_arena("layer 0", CHUNK_BYTES)
    weights = tensor_at(arena.address, (CHUNK_BYTES // 2,), torch.bfloat16, DEVICE)
    weights.fill_(1.0)
    pool.drop_arena("layer 0")
    pool.unmap_stale(BUDGET_BYTES)
    region = pool.kv_region(1, CHUNK_BYTES // 4)
    kv = tensor_at(region.address, (BUDGET_BYTES // 4,), torch.float32, DEVICE)
    num_blocks = pool.grow_kv_evenly([1])
    assert num_blocks == 4 * BUDGET_BYTES // CHUNK_BYTES
    kv.fill_(3.0)  # the whole budget is mapped there
    pool.shrink_kv([1], num_blocks - 4)
    pool.restore_arena("layer 0")
    weights.fill_(2.0)
    assert weights.float().sum().item() == 2.0 * len(weights)
    assert kv[: BUDGET_BYTES // 4 - CHUNK_BYTES // 4].min().item() == 3.0
    pool.close()


@pytest.mark.parametrize("name", ALL)
def test_tokens_are_those_of_transformers(name: str, tiny_models: TinyModels) -> None:
    requests = [
        make_request(f"r{index}", prompt, temperature=0.0, max_tokens=12)
        for index, prompt in enumerate(PROMPTS)
    ]
    with open_gpu_runner(tiny_models, name) as runner:
        run = run_engine(runner, requests, num_blocks=32)
    model = tiny_models.reference(name)
    for request in requests:
        expected = greedy_reference(model, request)
        assert run.tokens[request.request_id][: len(expected)] == expected


@pytest.mark.parametrize("num_blocks", [64, 8])
def test_steps_that_overlap_give_the_same_tokens(tiny_models: TinyModels, num_blocks: int) -> None:
    """Also where requests are preempted; rounding depends on the batch, so only the first few."""
    with open_gpu_runner(tiny_models, "llama") as runner:
        overlapped = serve(runner, num_blocks, overlaps=True)
        waiting = serve(runner, num_blocks, overlaps=False)
    assert overlapped.num_ahead > 20
    for name, expected in waiting.tokens.items():
        assert overlapped.tokens[name][:4] == expected[:4]


def test_a_launch_waits_for_nothing(tiny_models: TinyModels) -> None:
    """Whatever is sampled how, with graphs or without, and going on from an unknown token."""
    params = [
        SamplingParams.model_validate({**sampling, "logit_bias": {3: 1.0}})
        for sampling in SAMPLINGS
    ]
    blocks = [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in range(len(params))]
    prompts = [SequenceSlice(PROMPTS[0], 0, table, True) for table in blocks]
    decodes = [
        SequenceSlice([UNKNOWN_TOKEN], len(PROMPTS[0]), table, True, source_row=row)
        for row, table in enumerate(blocks)
    ]
    first = [SamplingRow(one, len(PROMPTS[0]), PROMPTS[0], (), (7,)) for one in params]
    then = [replace(row, position=row.position + 1, source_row=i) for i, row in enumerate(first)]
    with open_gpu_runner(tiny_models, "llama") as runner:
        for mode in ("default", "default", "error"):  # compile and capture before
            torch.cuda.set_sync_debug_mode(mode)
            try:
                pending = runner.launch(prompts, first)
                pending = runner.launch(decodes, then, pending)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert len(pending.result()) == len(params)


@pytest.mark.parametrize("name", ["llama", *OTHERS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_transformers(
    name: str, dtype: torch.dtype, tiny_models: TinyModels
) -> None:
    prompt = PROMPTS[0]
    with torch.inference_mode():
        expected = tiny_models.reference(name)(torch.tensor([prompt])).logits[0, -1]
    with open_gpu_runner(tiny_models, name, dtype) as runner:
        actual = last_logits(runner, [PagedSequence(prompt, [5, 1, 3]).take(len(prompt))])[0].cpu()
    assert (actual - expected).norm() / expected.norm() < 0.05


def test_two_stages_on_one_gpu_compute_what_one_computes(tiny_models: TinyModels) -> None:
    front, back = Span(start=0, end=2), Span(start=2, end=NUM_LAYERS)
    sequence = PagedSequence(PROMPTS[2], list(range(6))).take(len(PROMPTS[2]))
    with (
        open_gpu_runner(tiny_models, "qwen2-tied") as first,
        open_gpu_runner(tiny_models, "qwen2-tied") as second,
    ):
        expected = last_logits(first, [sequence])
        blocks = first.num_blocks
        assert first.keep(front) > blocks
        second.keep(back)
        batch = first.make_batch([sequence])
        hidden = second.forward(batch, first.forward(batch, first.embed(batch), front), back)
        row = SamplingRow(SamplingParams(temperature=0.0), len(PROMPTS[2]), (), ())
        [in_two] = second.sample(hidden, batch, [row]).result()
    assert in_two.token_id == expected.argmax().item()


def test_the_probe_finds_memory_mapping_and_export_working() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.worker.cuda_probe"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = {line["subject"]: line for line in map(json.loads, done.stdout.splitlines())}
    for subject in ("GPU", "GPU software", "GPU memory mapping"):
        assert found[subject]["is_ok"], found[subject]["detail"]
