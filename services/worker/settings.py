"""Settings of one worker process."""

from __future__ import annotations

import os
import secrets
import socket
from enum import StrEnum
from pathlib import Path

from pydantic import Field, field_validator

from services.worker.engine.config import ChunkPolicy
from shared.service_settings import ServiceSettings
from shared.settings import ByteSize
from shared.subjects import validate_name

MIB = 1024**2
GIB = 1024**3


class Device(StrEnum):
    """Where the model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    """Compute type. Weights of other types are converted while they are loaded."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class LinkChannel(StrEnum):
    """What carries tensors between GPUs."""

    AUTO = "auto"
    HOST = "host"
    CUDA_IPC = "cuda_ipc"
    NCCL = "nccl"


def default_worker_id() -> str:
    """Host name and a random suffix: unique when one service is scaled to many containers."""
    host = "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname())
    return f"{host[:40]}-{secrets.token_hex(3)}"


class WorkerSettings(ServiceSettings):
    """One serving instance: one process, one device, one memory budget."""

    worker_id: str = Field(
        default_factory=default_worker_id, description="unique name (default: host and random)"
    )
    model: str = Field(
        default="builtin:smollm2",
        description="builtin:smollm2, a Hugging Face safetensors directory, or a GGUF file",
    )
    cache_dir: Path | None = Field(
        default=None, description="where converted models and compiled kernels are kept"
    )
    device: Device = Field(default=Device.AUTO, description="auto, cpu or cuda")
    dtype: Dtype = Field(
        default=Dtype.AUTO,
        description="auto, float32, or on a GPU bfloat16 or float16 (auto: bfloat16 on a GPU)",
    )
    device_memory: ByteSize = Field(
        default=GIB, ge=MIB, description="budget for weights and KV cache, e.g. 1GiB"
    )
    threads: int = Field(
        default_factory=lambda: os.cpu_count() or 1, ge=1, le=1024, description="compute threads"
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="longest prompt plus output (default: the model's)"
    )
    max_num_batched_tokens: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="tokens one engine step computes at most (default: 256, on a GPU 8192)",
    )
    max_num_seqs: int = Field(default=256, ge=1, description="requests running at once at most")
    max_num_requests: int = Field(
        default=2048, ge=1, description="requests running and waiting at most; more are refused"
    )
    chunk_bytes: ByteSize | None = Field(
        default=None,
        ge=4096,
        description="unit of memory that moves between weights and KV (default: the device's)",
    )
    watermark: float = Field(
        default=0.05, ge=0.0, lt=0.1, description="share of the KV pool kept free at admission"
    )
    chunk_policy: ChunkPolicy = Field(
        default=ChunkPolicy.LOOKAHEAD,
        description="how prefill is cut on a pipeline: lookahead, predicted-time or token-count",
    )
    load_interval_seconds: float = Field(
        default=0.1, gt=0.0, le=5.0, description="time between load reports"
    )
    drain_timeout_seconds: float = Field(
        default=120.0, ge=0.0, description="time running requests get at shutdown"
    )
    link_host: str = Field(
        default="127.0.0.1", description="address to take links from other workers on"
    )
    link_advertise: str = Field(
        default="", description="what other workers connect to (default: the same)"
    )
    link_bandwidth: ByteSize | None = Field(
        default=None, ge=4096, description="emulate links of so many bytes per second, e.g. 10MiB"
    )
    link_shared_memory: bool = Field(
        default=True, description="use shared memory between workers of one host, else TCP"
    )
    link_channel: LinkChannel = Field(
        default=LinkChannel.AUTO,
        description="how tensors travel between GPUs: auto, host, cuda_ipc or nccl"
        " (auto: CUDA IPC on one host, else NCCL, else through the host)",
    )
    admin_host: str = Field(default="127.0.0.1", description="address of /live, /ready, /metrics")
    admin_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="port of the admin endpoints, 0 for any (default: none)",
    )

    @field_validator("worker_id")
    @classmethod
    def _check_worker_id(cls, value: str) -> str:
        return validate_name(value, "worker id")

    @field_validator("chunk_bytes")
    @classmethod
    def _check_chunk_bytes(cls, value: int | None) -> int | None:
        if value is not None and value % 4096:
            raise ValueError(f"{value} is not a multiple of the 4096-byte page")
        return value
