"""From the settings' device and type to what computes on them. Engine thread, at start-up.

Nothing here needs a GPU or a CUDA package to be imported. The CUDA side has never run on a GPU.
"""

from __future__ import annotations

from pathlib import Path

import torch

from services.worker.kernels.cpu import CpuKernels
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.settings import Device, Dtype, WorkerSettings
from shared.errors import ConfigError

_MIB = 1024**2
_CPU_CHUNK_BYTES = _MIB // 2
#: Granularity of CUDA's virtual memory management on all devices so far.
_CUDA_CHUNK_BYTES = 2 * _MIB
#: Each chunk is a handle of its own and a call to map it.
_MAX_CUDA_CHUNKS = 8192
_CPU_BATCHED_TOKENS = 256
_CUDA_BATCHED_TOKENS = 8192
_CPU_EXCHANGE_TOKENS = 32


def select_device(setting: Device) -> torch.device:
    """The device to run on: with `auto` a GPU where torch sees one.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    if setting is Device.CPU or (setting is Device.AUTO and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "there is no CUDA device that torch can use; `kunserve doctor` says what is missing"
        )
    return torch.device("cuda", torch.cuda.current_device())


def select_dtype(device: torch.device, setting: Dtype) -> torch.dtype:
    """The type to compute in: with `auto` bfloat16 on a GPU.

    Raises:
        ConfigError: the device does not serve it.
    """
    if device.type == "cpu":
        if setting not in (Dtype.AUTO, Dtype.FLOAT32):
            raise ConfigError(f"dtype {setting} needs a GPU; the CPU computes in float32")
        return torch.float32
    return {
        Dtype.AUTO: torch.bfloat16,
        Dtype.BFLOAT16: torch.bfloat16,
        Dtype.FLOAT16: torch.float16,
        Dtype.FLOAT32: torch.float32,
    }[setting]


def default_chunk_bytes(device: torch.device, budget_bytes: int) -> int:
    """A chunk small enough to waste little, and large enough that a budget has not too many."""
    if device.type == "cpu":
        return _CPU_CHUNK_BYTES
    return _CUDA_CHUNK_BYTES * -(-budget_bytes // (_MAX_CUDA_CHUNKS * _CUDA_CHUNK_BYTES))


def exchange_prefill_tokens(device: torch.device) -> int | None:
    """See `SchedulerConfig`: a GPU copies while it computes; 32 rows keep a CPU's cores busy."""
    return _CPU_EXCHANGE_TOKENS if device.type == "cpu" else None


def default_max_num_batched_tokens(device: torch.device) -> int:
    """Tokens of a step: enough to be bound by arithmetic, and a fraction of a second of it."""
    return _CPU_BATCHED_TOKENS if device.type == "cpu" else _CUDA_BATCHED_TOKENS


def make_kernels(settings: WorkerSettings, cache_dir: Path) -> CpuKernels | TorchKernels:
    """The kernels of the device that the settings ask for.

    Raises:
        ConfigError: there is no such device, or it does not serve that type.
        KernelBuildError: the CPU kernels cannot be compiled here.
    """
    device = select_device(settings.device)
    dtype = select_dtype(device, settings.dtype)
    if device.type == "cpu":
        return CpuKernels(settings.threads, cache_dir=cache_dir / "kernels")
    try:
        from services.worker.kernels.cuda.ops import TritonOps
    except ImportError as error:
        raise ConfigError("CUDA needs the package triton, which comes with torch") from error
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return TorchKernels(device, dtype, TritonOps())
