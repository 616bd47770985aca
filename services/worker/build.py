"""From settings to a running engine: resolve the model, load it, size the KV cache, know its costs.

Runs in the engine thread, because everything that touches the device does.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog
import torch

from services.worker.channel_options import make_channel_factory
from services.worker.channels.factory import ChannelFactory, TensorSizes
from services.worker.core import EngineCore
from services.worker.device import (
    default_chunk_bytes,
    default_max_num_batched_tokens,
    exchange_prefill_tokens,
    make_kernels,
)
from services.worker.engine.block_manager import BlockManager
from services.worker.engine.config import SchedulerConfig
from services.worker.engine.cost_model import TOKEN_COUNT, CostModelError
from services.worker.engine.profile import ModelProfile
from services.worker.engine.routes import Route
from services.worker.engine.scheduler import Scheduler
from services.worker.facts import model_facts
from services.worker.identity import ModelFacts
from services.worker.kernels.cpu import CpuKernels
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.model.loading import RunnerConfig
from services.worker.model.profiler import profile_model
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.member import GroupMember
from services.worker.profile_cache import ProfileCache, profile_key
from services.worker.settings import WorkerSettings
from services.worker.tidying import Tidying
from shared.cache_dir import default_cache_dir
from shared.models import ProgressReporter, resolve_model

#: Changes with what is measured, and how: profiles of other formats are measured anew.
_PROFILE_FORMAT = 1


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A loaded engine, its part in groups, what is to be known of it, and the model to close.

    Attributes:
        channels: what its tensors may travel by.
    """

    core: EngineCore
    member: GroupMember
    facts: ModelFacts
    runner: ModelRunner
    tidying: Tidying
    channels: ChannelFactory


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
    kernels = make_kernels(settings, cache_dir)
    chunk_bytes = settings.chunk_bytes or default_chunk_bytes(
        kernels.device, settings.device_memory
    )
    max_num_batched_tokens = settings.max_num_batched_tokens or default_max_num_batched_tokens(
        kernels.device
    )
    runner = ModelRunner.load(
        RunnerConfig(
            model_dir=model_dir,
            memory_bytes=settings.device_memory,
            chunk_bytes=chunk_bytes,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=settings.max_model_len,
        ),
        kernels,
    )
    runner.profile = _profile(cache_dir, model_dir, runner, kernels, max_num_batched_tokens)
    if runner.profile is not None:
        runner.meter.layer = runner.profile.layer
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=min(settings.max_num_seqs, max_num_batched_tokens),
            max_model_len=runner.max_model_len,
            max_num_waiting_requests=settings.max_num_requests,
            watermark=settings.watermark,
            chunk_policy=settings.chunk_policy,
            overlaps=runner.device.type != "cpu",  # which computes while this thread does not
            exchange_prefill_tokens=exchange_prefill_tokens(kernels.device),
        ),
        BlockManager(runner.num_blocks, runner.block_size),
        Route.of_replica(settings.worker_id, runner.config.num_layers),
        TOKEN_COUNT if runner.profile is None else runner.profile.layer,
    )
    core = EngineCore(scheduler, runner)
    member = GroupMember(core, scheduler, runner)
    tidying = Tidying(runner.pool, runner.activity)
    activation_bytes = max_num_batched_tokens * runner.config.hidden_size * runner.dtype.itemsize
    channels = make_channel_factory(
        settings, kernels.device, TensorSizes(activation_bytes, runner.kv_block_bytes)
    )
    return BuiltEngine(core, member, model_facts(runner), runner, tidying, channels)


def _profile(
    cache_dir: Path,
    model_dir: Path,
    runner: ModelRunner,
    kernels: CpuKernels | TorchKernels,
    max_num_batched_tokens: int,
) -> ModelProfile | None:
    """What batches cost with this model, these kernels and threads, on this machine.

    None where times are too noisy to tell: then all tokens count alike.
    """
    log = structlog.get_logger(component="profile")
    key = profile_key(
        _PROFILE_FORMAT,
        (model_dir / "config.json").read_bytes(),
        kernels.build_id,
        kernels.num_threads,
        len(os.sched_getaffinity(0)),
        runner.max_model_len,
        max_num_batched_tokens,
    )
    try:
        profile = ProfileCache(cache_dir / "profiles").get(
            key, lambda: profile_model(runner, max_num_batched_tokens)
        )
    except CostModelError as error:
        log.warning("no cost model", reason=str(error))
        return None
    mean, p90 = profile.fit_error
    log.info("cost model", **asdict(profile.layer), mean_error=round(mean, 3), p90=round(p90, 3))
    return profile
