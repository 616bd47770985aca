"""Kernels and tiny models, made once for all tests of the model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from services.worker.kernels.cpu import CpuKernels
from tests.tiny_models import TinyModels


@pytest.fixture(scope="session")
def kernels() -> Iterator[CpuKernels]:
    with CpuKernels(2) as kernels:
        yield kernels


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("tiny-models"))


@pytest.fixture(autouse=True)
def _torch_as_in_the_worker() -> Iterator[None]:
    """One torch thread, as services/worker/build.py sets it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
