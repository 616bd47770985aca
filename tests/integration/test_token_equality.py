"""The built-in model answers real prompts as transformers does, in one continuous batch.

Scheduler, paged KV, kernels and sampler are those of a worker; `test_up.py` and its neighbours put
processes around them.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from services.router.tokenizer import load_tokenizer
from services.worker.engine.request import Request
from services.worker.kernels.cpu import CpuKernels
from services.worker.model.loading import RunnerConfig
from services.worker.model.runner import ModelRunner
from shared.cache_dir import default_cache_dir
from shared.models import ProgressReporter, resolve_model
from tests.tiny_models import load_reference
from tests.unit.model.request_helpers import greedy_reference, make_request, run_engine

MIB = 1024**2
BUDGET_BYTES = 640 * MIB
CHUNK_BYTES = 2 * MIB
MAX_NUM_TOKENS = 256
END_OF_TURN = (2,)

#: What a worker may take beyond its budget: activations, logits, rotary table, allocator.
OVERHEAD_BYTES = 64 * MIB

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three prime numbers greater than 20.",
    "Translate 'good morning' to Spanish.",
    "def fibonacci(n):",
    "Summarise: " + "The quick brown fox jumps over the lazy dog. " * 20,
    "¿Qué es el átomo? 原子とは何ですか 🙂",
]


@pytest.fixture(scope="module")
def directory() -> Path:
    return resolve_model(
        "builtin:smollm2", default_cache_dir(os.environ), ProgressReporter(sys.stderr, "converting")
    )


@pytest.fixture(scope="module")
def runner(directory: Path) -> Iterator[ModelRunner]:
    kernels = CpuKernels(os.cpu_count() or 1)
    config = RunnerConfig(directory, BUDGET_BYTES, CHUNK_BYTES, MAX_NUM_TOKENS, None)
    runner = ModelRunner.load(config, kernels)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def prompts(directory: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(directory)
    assert tokenizer.chat_template is not None
    texts = [
        tokenizer.chat_template.render([{"role": "user", "content": question}])
        for question in QUESTIONS
    ]
    return [asyncio.run(tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def make_requests(prompts: list[list[int]], **sampling: object) -> list[Request]:
    return [
        make_request(str(index), prompt, END_OF_TURN, **sampling)
        for index, prompt in enumerate(prompts)
    ]


def test_greedy_tokens_are_those_of_generate(
    directory: Path, prompts: list[list[int]], runner: ModelRunner
) -> None:
    requests = make_requests(prompts, max_tokens=24, temperature=0.0)
    tokens = run_engine(runner, requests, runner.num_blocks, max_num_batched_tokens=100).tokens
    num_compared = 0
    for request in requests:
        expected = greedy_reference(load_reference(directory), request)
        assert tokens[request.request_id][: len(expected)] == expected
        num_compared += len(expected)
    assert num_compared > 100


def test_a_preempted_request_goes_on_as_if_nothing_had_happened(
    prompts: list[list[int]], runner: ModelRunner
) -> None:
    sampling = {"max_tokens": 30, "temperature": 0.8, "top_p": 0.95, "seed": 5, "ignore_eos": True}
    undisturbed = run_engine(runner, make_requests(prompts, **sampling), runner.num_blocks)
    disturbed = run_engine(
        runner, make_requests(prompts, **sampling), num_blocks=28, max_num_batched_tokens=50
    )
    assert undisturbed.num_preemptions == 0
    assert disturbed.num_preemptions > 0
    assert disturbed.tokens == undisturbed.tokens
    for tokens, logits in undisturbed.logits.items():
        assert torch.equal(disturbed.logits[tokens], logits)


FILL_THE_BUDGET = """
import sys
from pathlib import Path
from services.worker.kernels.cpu import CpuKernels
from services.worker.model.batch import SequenceSlice
from services.worker.model.loading import RunnerConfig
from services.worker.model.runner import ModelRunner
from services.worker.model.sampler import SamplingRow
from shared.sampling import SamplingParams

def report():
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    names = ("RssAnon", "RssFile", "RssShmem")
    print("resident", *(int(values[name].split()[0]) * 1024 for name in names))

directory, budget, chunk, num_tokens = Path(sys.argv[1]), *map(int, sys.argv[2:])
kernels = CpuKernels(2)
report()
runner = ModelRunner.load(RunnerConfig(directory, budget, chunk, num_tokens, None), kernels)
blocks = list(range(runner.num_blocks))
row = SamplingRow(SamplingParams(temperature=0.7, top_p=0.9), 0, [], [])
for start in range(0, runner.num_blocks * runner.block_size - num_tokens + 1, num_tokens):
    runner.launch([SequenceSlice([5] * num_tokens, start, blocks, True)], [row]).result()
decodes = [SequenceSlice([5], 16 * i, blocks[i:] + blocks[:i], True) for i in range(32)]
runner.launch(decodes, [row] * len(decodes)).result()
report()
"""


def test_resident_memory_stays_within_the_budget(directory: Path) -> None:
    arguments = [str(directory), str(BUDGET_BYTES), str(CHUNK_BYTES), str(MAX_NUM_TOKENS)]
    done = subprocess.run(
        [sys.executable, "-c", FILL_THE_BUDGET, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    reports = [line.split() for line in done.stdout.splitlines() if line.startswith("resident")]
    before, after = (map(int, report[1:]) for report in reports)
    anonymous, files, budget = (b - a for a, b in zip(before, after, strict=True))
    assert BUDGET_BYTES * 3 // 4 < budget <= BUDGET_BYTES  # it was used, and not exceeded
    assert anonymous + files <= OVERHEAD_BYTES  # the checkpoint's pages are not kept either
