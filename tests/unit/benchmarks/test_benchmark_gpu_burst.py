"""The GPU burst: a model that workers load, budgets that make the burst too large, its options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu_burst import (
    NEED,
    TRACE_SHARE,
    burst_tokens,
    overload_options,
    worker_bytes,
    write_model,
)
from benchmarks.gpu_model import model_config
from benchmarks.overload import make_scaling
from benchmarks.overload_workload import plan_arrivals, read_trace
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.model.runner import ModelRunner, RunnerConfig
from shared.errors import ConfigError
from tests.torch_ops import TorchOps

CPU = torch.device("cpu")
TOKEN_BYTES = 4 * 2 * 2 * 16 * 2  # of the tiny shape in bf16: layers, K and V, heads, their size


def test_a_worker_loads_the_model_that_was_written(tmp_path: Path) -> None:
    write_model("tiny", tmp_path, CPU, torch.bfloat16)
    kernels = TorchKernels(CPU, torch.bfloat16, TorchOps())
    runner = ModelRunner.load(RunnerConfig(tmp_path, 4 << 20, 16 * 1024, 64, None), kernels)
    assert runner.config == model_config("tiny")
    assert (tmp_path / "tokenizer.json").exists()
    runner.close()


@pytest.mark.parametrize("num_workers", [2, 4])
def test_the_burst_needs_more_than_the_workers_have(num_workers: int) -> None:
    config = model_config("tiny")
    budget = worker_bytes(config, torch.bfloat16, num_workers, burst_tokens(), 1 << 40)
    weights = worker_bytes(config, torch.bfloat16, num_workers, 0, 1 << 40)
    capacity = num_workers * (budget - weights) // TOKEN_BYTES
    assert capacity == pytest.approx(TRACE_SHARE * burst_tokens() / NEED, rel=0.01)
    options = overload_options(Path("model"), num_workers, budget, Path("out"), seeds=1)
    arrivals = plan_arrivals(read_trace(), make_scaling(options), round(NEED * capacity), seed=1)
    burst = sum(arrival.tokens for arrival in arrivals if arrival.in_burst)
    assert burst == pytest.approx(NEED * capacity, rel=0.02)


def test_workers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 workers need"):
        worker_bytes(model_config("tiny"), torch.bfloat16, 4, burst_tokens(), 1 << 20)
