"""Kernels, made once for all tests of the model, and torch as the worker sets it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from services.worker.kernels.cpu import CpuKernels


@pytest.fixture(scope="session")
def kernels() -> Iterator[CpuKernels]:
    with CpuKernels(2) as kernels:
        yield kernels


@pytest.fixture(autouse=True)
def _torch_as_in_the_worker() -> Iterator[None]:
    """One torch thread, as services/worker/build.py sets it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
