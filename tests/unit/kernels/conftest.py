"""Kernels on two threads and on one, compiled once into the user's cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from services.worker.kernels.cpu import CpuKernels


@pytest.fixture(scope="session")
def kernels() -> Iterator[CpuKernels]:
    with CpuKernels(2) as kernels:
        yield kernels


@pytest.fixture(scope="session")
def single(kernels: CpuKernels) -> Iterator[CpuKernels]:
    with CpuKernels(1) as single:
        yield single


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
