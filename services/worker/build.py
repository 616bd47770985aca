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
from services.worker.facts import model_facts
from services.worker.identity import ModelFacts
from services.worker.kernels.cpu import CpuKernels
from services.worker.model.runner import ModelRunner, RunnerConfig
from services.worker.pipeline.leader_restore import replica_route
from services.worker.pipeline.member import GroupMember
from services.worker.settings import WorkerSettings
from shared.cache_dir import default_cache_dir
from shared.models import ProgressReporter, resolve_model


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A loaded engine, its part in groups, what is to be known of it, and the model to close."""

    core: EngineCore
    member: GroupMember
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
        replica_route(settings.worker_id, runner.config.num_layers),
    )
    core = EngineCore(scheduler, runner)
    member = GroupMember(core, scheduler, runner)
    return BuiltEngine(core, member, model_facts(runner), runner)
