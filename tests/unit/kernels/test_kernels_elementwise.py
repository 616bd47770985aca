"""rms_norm, silu_mul and moving KV blocks."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import aligned_floats, geometry

from services.worker.kernels.cpu import CpuKernels


@pytest.mark.parametrize("dim", [576, 64, 37, 8192])
def test_rms_norm_equals_double_precision(kernels: CpuKernels, dim: int) -> None:
    x, weight, out = torch.randn(50, dim) * 3, torch.randn(dim), torch.empty(50, dim)
    kernels.rms_norm(x, weight, 1e-5, out)
    wide = x.double()
    want = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1536, 37])
def test_silu_mul_equals_double_precision(kernels: CpuKernels, size: int) -> None:
    gate_up, out = torch.randn(50, 2 * size) * 4, torch.empty(50, size)
    gate_up[0, :10] = torch.tensor([0, -0.0, 80, -80, -87.5, -100, 100, 1e30, -1e30, 1e-30])
    kernels.silu_mul(gate_up, out)
    gate, up = gate_up.double().chunk(2, -1)
    torch.testing.assert_close(
        out.double(), torch.nn.functional.silu(gate) * up, rtol=5e-7, atol=1e-34
    )


def test_rows_do_not_depend_on_their_neighbours(kernels: CpuKernels, single: CpuKernels) -> None:
    x, weight = torch.randn(200, 100), torch.randn(100)
    normed, activated = torch.empty(200, 100), torch.empty(200, 50)
    kernels.rms_norm(x, weight, 1e-6, normed)
    kernels.silu_mul(x, activated)
    for row in range(0, 200, 7):
        one = slice(row, row + 1)
        out, half = torch.empty(1, 100), torch.empty(1, 50)
        single.rms_norm(x[one], weight, 1e-6, out)
        single.silu_mul(x[one], half)
        assert torch.equal(out, normed[one])
        assert torch.equal(half, activated[one])


def test_a_not_a_number_stays_in_its_place(kernels: CpuKernels) -> None:
    gate_up = torch.ones(3, 64)
    gate_up[1, 5] = torch.nan
    out = torch.empty(3, 32)
    kernels.silu_mul(gate_up, out)
    assert out.isnan().nonzero().tolist() == [[1, 5]]


def test_blocks_are_copied_in_order_and_cleared(kernels: CpuKernels) -> None:
    shape = geometry(2, 2, 16)
    kv = aligned_floats(6 * 2 * 16 * 2 * 16).view(6, 2, 16, 2, 16)
    kv.copy_(torch.randn_like(kv))
    before = kv.clone()
    kernels.copy_blocks(kv.data_ptr(), torch.tensor([[4, 1], [5, 4]]), shape)
    kernels.zero_blocks(kv.data_ptr(), torch.tensor([0, 5]), shape)
    assert torch.equal(kv[1], before[4])
    assert torch.equal(kv[4], before[5])
    assert torch.equal(kv[2:4], before[2:4])
    assert not kv[[0, 5]].any()
