"""The GPU benchmark's measurements, on a tiny model on the CPU: what they count, not how fast."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.gpu import measure_theirs, render_decode, render_drop, render_prefill
from benchmarks.gpu_measure import (
    copy_rate,
    matmul_rate,
    measure_decode,
    measure_drop,
    measure_prefill,
)
from benchmarks.gpu_model import random_model
from benchmarks.gpu_throughput import Workload, measure_ours, render_throughput
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.model.runner import ModelRunner
from tests.torch_ops import TorchOps

CPU = torch.device("cpu")
CHUNK_BYTES = 16 * 1024
LAYER_WEIGHTS = 64 * (64 + 2 * 32) + 128 + 64 * 64 + 3 * 64 * 96 + 2 * 64
HEAD_WEIGHTS = 512 * 64


@pytest.fixture
def runner() -> Iterator[ModelRunner]:
    kernels = TorchKernels(CPU, torch.float32, TorchOps())
    made = random_model("tiny", kernels, 4 << 20, CHUNK_BYTES, max_num_batched_tokens=64)
    yield made
    made.close()


def test_decode_counts_what_a_step_reads(runner: ModelRunner) -> None:
    found = measure_decode(runner, batch_size=3, context=20, repetitions=2)
    kv_bytes = 3 * 20 * 4 * 2 * 2 * 16 * 4  # tokens, layers, K and V, heads, their size, floats
    assert found.bytes_needed == 4 * (4 * LAYER_WEIGHTS + 64 + HEAD_WEIGHTS) + kv_bytes
    assert found.seconds > 0
    assert found.share_of(found.bytes_needed / found.seconds) == pytest.approx(1.0)
    assert "3 x 20 tokens" in render_decode([found], 1e9)


def test_prefill_counts_what_a_step_computes(runner: ModelRunner) -> None:
    found = measure_prefill(runner, num_prompts=2, length=16, repetitions=1)
    products = 2 * (32 * (4 * LAYER_WEIGHTS + 64) + 2 * HEAD_WEIGHTS)
    assert found.operations == products + 4 * 2 * 2 * 16**2 * 4 * 16
    assert "2 x 16 tokens" in render_prefill(found, 1e12)


def test_a_drop_gives_half_of_the_layers_to_the_kv(runner: ModelRunner) -> None:
    found = measure_drop(runner)
    assert found.dropped_bytes >= 2 * 4 * LAYER_WEIGHTS
    assert found.blocks_after > found.blocks_before
    assert str(found.blocks_after) in render_drop(found)


def test_the_same_work_for_both_engines(runner: ModelRunner) -> None:
    workload = Workload(num_requests=3, prompt_tokens=5, output_tokens=4)
    limits = {"num_blocks": 8, "max_batch_tokens": 64}  # else it takes all memory there is
    theirs = measure_theirs("tiny", torch.float32, CPU, [workload], **limits)
    found = measure_ours(runner, workload, 64, theirs[workload])
    assert found.num_tokens == 3 * 4
    assert min(found.ours_seconds, found.serial_seconds, found.theirs_seconds) > 0
    table = render_throughput([found])
    assert "3 x 5 + 4" in table
    assert f"{12 / theirs[workload]:.0f}" in table


def test_more_sequences_than_blocks_are_refused(runner: ModelRunner) -> None:
    with pytest.raises(ValueError, match="blocks are needed"):
        measure_decode(runner, batch_size=1000, context=1000, repetitions=1)


def test_rates_are_measured() -> None:
    assert copy_rate(CPU, 1 << 16, repetitions=1) > 0
    assert matmul_rate(CPU, torch.float32, 16, repetitions=1) > 0
