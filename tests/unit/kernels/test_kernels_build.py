"""Compiling and caching the C library."""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
from pathlib import Path

import pytest
import torch
from kernel_helpers import Pages, batch_of, geometry, pack

from services.worker.kernels.build import (
    Compiler,
    KernelBuildError,
    build_library,
    find_compiler,
)
from services.worker.kernels.cpu import CpuKernels
from services.worker.kernels.library import load_library
from shared.cache_dir import default_cache_dir

DEADLINE_SECONDS = 120.0


def build(cache_dir: Path) -> None:
    load_library(build_library(find_compiler(os.environ), cache_dir))


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=build, args=(tmp_path / "cache",)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE_SECONDS)
    assert [process.exitcode for process in processes] == [0, 0]
    (library,) = (tmp_path / "cache").glob("*.so")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    made = library.stat().st_mtime_ns
    build(tmp_path / "cache")
    assert library.stat().st_mtime_ns == made


def test_a_failing_compiler_is_reported_with_its_log(tmp_path: Path) -> None:
    script = tmp_path / "cc"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho no such sea >&2\nexit 3\n')
    script.chmod(0o755)
    compiler = find_compiler({"KUNSERVE_CC": str(script)})
    with pytest.raises(KernelBuildError, match=r"do not compile .* status 3") as caught:
        build_library(compiler, tmp_path / "cache")
    (log,) = (tmp_path / "cache").glob("*.log")
    assert str(log) in str(caught.value)
    assert "no such sea" in log.read_text()
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    with pytest.raises(KernelBuildError, match="no-such-compiler"):
        find_compiler({"KUNSERVE_CC": "no-such-compiler"})
    with pytest.raises(KernelBuildError, match="no-such-compiler"):
        build_library(Compiler(("no-such-compiler",), ()), tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KernelBuildError, match="cannot write the kernel cache"):
        build_library(find_compiler(os.environ), tmp_path / "file")


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kernels.so").write_text("not an object")
    with pytest.raises(KernelBuildError, match="cannot be loaded"):
        CpuKernels(1, library=tmp_path / "kernels.so")


def test_processes_that_start_at_once_compile_once(tmp_path: Path) -> None:
    script, compiled = tmp_path / "cc", tmp_path / "compiled"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho >>{compiled}\n'
        'for last in "$@"; do :; done\ntouch "$last"\n'
    )
    script.chmod(0o755)
    compiler = Compiler((str(script),), ())
    context = multiprocessing.get_context("spawn")
    arguments = (compiler, tmp_path / "cache")
    processes = [context.Process(target=build_library, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE_SECONDS)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert compiled.read_text().count("\n") == 1


def test_a_new_version_of_the_compiler_makes_another_library(tmp_path: Path) -> None:
    script = tmp_path / "cc"
    libraries = set()
    for version in (1, 2, 1):
        script.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit 0\n'
            'for last in "$@"; do :; done\ntouch "$last"\n'
        )
        script.chmod(0o755)
        libraries.add(build_library(find_compiler({"KUNSERVE_CC": str(script)}), tmp_path))
    assert len(libraries) == 2


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux" or "KUNSERVE_CC" in os.environ,
    reason="compares two widths of x86 vectors",
)
def test_the_width_of_vectors_changes_no_bit(kernels: CpuKernels) -> None:
    if not torch.cpu._is_avx2_supported():
        pytest.skip("this CPU has no AVX2")
    cache_dir = default_cache_dir(os.environ) / "kernels"
    library = build_library(find_compiler({}, cpu="x86_64_v3"), cache_dir)
    with CpuKernels(2, library=library) as narrow:
        assert all(
            torch.equal(*pair)
            for pair in zip(every_result(kernels), every_result(narrow), strict=True)
        )


def every_result(kernels: CpuKernels) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x, weight = torch.randn(50, 96), torch.randn(192, 96)
    product, normed, activated = torch.empty(50, 192), torch.empty(50, 96), torch.empty(50, 96)
    packed, shape, pages = pack(kernels, weight), geometry(2, 1, 48), Pages.empty([50], 1, 48)
    kernels.linear(x, packed.data_ptr(), 192, product)
    kernels.rms_norm(x, weight[0], 1e-6, normed)
    kernels.silu_mul(product, activated)
    batch = batch_of(pages, [(0, 0, 50)], torch.rand(50, 48), torch.rand(50, 48))
    kernels.rope_and_store(product, pages.kv.data_ptr(), shape, batch)
    out = torch.empty(50, 2, 48)
    q = product[:, :96].unflatten(1, (2, 48))
    kernels.paged_attention(q, pages.kv.data_ptr(), shape, batch, out)
    return [product, normed, activated, out]
