"""A model into a worker's memory, all layers of it.

In this order: check that the budget holds the weights and a smallest KV cache, before anything is
loaded; load the weights; give all that is left to the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.worker.kernels.cpu import CpuKernels
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.memory.factory import make_memory
from services.worker.memory.pool import MemoryPool
from services.worker.model.checkpoint import WeightSource
from services.worker.model.layers.factory import make_decoder_layers
from services.worker.model.plan import ModelPlan
from services.worker.model.stage import Stage
from shared.layout import Span


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """What the runner needs of the worker's settings."""

    model_dir: Path
    memory_bytes: int
    chunk_bytes: int
    max_num_batched_tokens: int
    max_model_len: int | None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and the memory it lies in."""

    plan: ModelPlan
    stage: Stage
    pool: MemoryPool


def load_model(
    weights: WeightSource, runner_config: RunnerConfig, kernels: CpuKernels | TorchKernels
) -> LoadedModel:
    """Load every layer and give what is left of the budget to the KV cache.

    Raises:
        ConfigError: the checkpoint or the budget cannot work; one sentence.
    """
    config = weights.config
    layers = make_decoder_layers(config, kernels, runner_config.max_num_batched_tokens)
    plan = ModelPlan(config, layers, kernels)
    span = Span(start=0, end=config.num_layers)
    plan.check_budget(
        span, runner_config.memory_bytes, runner_config.chunk_bytes, runner_config.max_model_len
    )
    pool = MemoryPool(
        make_memory(kernels.device, runner_config.memory_bytes, runner_config.chunk_bytes)
    )
    stage = Stage(plan, span, weights, pool, kernels)
    for _ in stage.load(span):
        pass
    pool.grow_kv_evenly(range(span.start, span.end))
    return LoadedModel(plan, stage, pool)
