"""Which device, type and chunk the settings come to."""

from __future__ import annotations

import pytest
import torch

from services.worker.device import default_chunk_bytes, select_device, select_dtype
from services.worker.settings import Device, Dtype
from shared.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 1024**3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert select_device(Device.AUTO) == select_device(Device.CPU) == CPU
    with pytest.raises(ConfigError, match="there is no CUDA device"):
        select_device(Device.CUDA)


@pytest.mark.parametrize(
    ("device", "setting", "expected"),
    [
        (CPU, Dtype.AUTO, torch.float32),
        (CPU, Dtype.FLOAT32, torch.float32),
        (CUDA, Dtype.AUTO, torch.bfloat16),
        (CUDA, Dtype.FLOAT16, torch.float16),
        (CUDA, Dtype.FLOAT32, torch.float32),
    ],
)
def test_the_type_is_the_device_s(
    device: torch.device, setting: Dtype, expected: torch.dtype
) -> None:
    assert select_dtype(device, setting) is expected


def test_the_cpu_refuses_half_precision() -> None:
    with pytest.raises(ConfigError, match="bfloat16 needs a GPU"):
        select_dtype(CPU, Dtype.BFLOAT16)


@pytest.mark.parametrize("budget_bytes", [GIB, 16 * GIB, 120 * GIB, 1000 * GIB])
def test_a_gpu_s_chunks_are_whole_pages_and_not_too_many(budget_bytes: int) -> None:
    chunk_bytes = default_chunk_bytes(CUDA, budget_bytes)
    assert chunk_bytes % (2 * 1024**2) == 0
    assert budget_bytes / chunk_bytes <= 8192
    assert chunk_bytes <= max(2 * 1024**2, budget_bytes // 4096)
