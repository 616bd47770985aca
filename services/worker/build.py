"""From settings to a running engine: resolve the model, load it, size the KV cache.

Runs in the engine thread, because everything that touches the device does.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch

from services.worker.core import EngineCore
from services.worker.engine.block_manager import BlockManager
from services.worker.engine.config import SchedulerConfig
from services.worker.engine.scheduler import Scheduler
from services.worker.identity import ModelFacts
from services.worker.kernels.cpu import CpuKernels
from services.worker.model.runner import ModelRunner, RunnerConfig
from services.worker.settings import WorkerSettings
from shared.cache_dir import default_cache_dir
from shared.models import ProgressReporter, resolve_model


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A loaded engine, what is to be known of it, and the model to close at the end."""

    core: EngineCore
    facts: ModelFacts
    runner: ModelRunner


def build_engine(settings: WorkerSettings) -> BuiltEngine:
    """Load the model and put a scheduler on top.

    Raises:
        ConfigError: the model or the settings cannot work; one sentence.
        KernelBuildError: the CPU kernels cannot be compiled here.
    """
    cache_dir = settings.cache_dir or default_cache_dir(os.environ)
    model_dir = resolve_model(
        settings.model, cache_dir, ProgressReporter(sys.stderr, f"converting {settings.model}")
    )
    # What torch still computes (sampling) is small; its own threads would fight with the kernels'.
    torch.set_num_threads(1)
    kernels = CpuKernels(settings.threads, cache_dir=cache_dir / "kernels")
    runner = ModelRunner.load(
        RunnerConfig(
            model_dir=model_dir,
            memory_bytes=settings.device_memory,
            chunk_bytes=settings.chunk_bytes,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=settings.max_model_len,
        ),
        kernels,
    )
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_num_seqs=min(settings.max_num_seqs, settings.max_num_batched_tokens),
            max_model_len=runner.max_model_len,
            max_num_waiting_requests=settings.max_num_requests,
            watermark=settings.watermark,
        ),
        BlockManager(runner.num_blocks, runner.block_size),
    )
    return BuiltEngine(EngineCore(scheduler, runner), model_facts(runner), runner)


def model_facts(runner: ModelRunner) -> ModelFacts:
    """What a worker's lease says of its model and memory."""
    usage = runner.pool.usage
    return ModelFacts(
        num_layers=runner.config.num_layers,
        vocab_size=runner.config.vocab_size,
        max_model_len=runner.max_model_len,
        block_size=runner.block_size,
        num_blocks=runner.num_blocks,
        kv_block_bytes=runner.kv_block_bytes * len(runner.span),
        memory_bytes=runner.pool.budget_bytes,
        weight_bytes=usage.weight_bytes,
        kv_bytes=usage.kv_bytes,
        free_bytes=usage.free_bytes,
        layers=(runner.span,),
    )
