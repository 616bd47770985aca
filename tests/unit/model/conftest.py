"""Kernels, made once for all tests of the model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.worker.kernels.cpu import CpuKernels


@pytest.fixture(scope="session")
def kernels() -> Iterator[CpuKernels]:
    with CpuKernels(2) as kernels:
        yield kernels
