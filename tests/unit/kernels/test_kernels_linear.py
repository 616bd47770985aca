"""Linear layers and embedding on packed weights: right, and the same bits for any batch."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import aligned_floats, pack

from services.worker.kernels.cpu import CpuKernels

SHAPES = [(960, 576), (576, 576), (576, 1536), (100, 37), (7, 3), (33, 2048), (16, 8192), (1, 1)]


def run(
    kernels: CpuKernels,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.full((len(x), len(weight)), torch.nan)
    packed = pack(kernels, weight)
    kernels.linear(x, packed.data_ptr(), len(weight), out, bias=bias, residual=residual)
    return out


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 16, 61, 300])
def test_equals_the_product_in_double_precision(
    kernels: CpuKernels, n: int, k: int, rows: int
) -> None:
    x, weight = torch.randn(rows, k), torch.randn(n, k) / k**0.5
    bias, residual = torch.randn(n), torch.randn(rows, n)
    want = residual.double() + x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(
        run(kernels, x, weight, bias, residual).double(), want, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("n", "k"), [(96, 576), (100, 37), (576, 64), (33, 2048)])
def test_a_row_has_the_same_bits_in_every_batch(
    kernels: CpuKernels, single: CpuKernels, n: int, k: int
) -> None:
    x, weight = torch.randn(70, k), torch.randn(n, k)
    bias, packed = torch.randn(n), pack(kernels, weight)
    alone = torch.empty(70, n)
    for row in range(70):
        single.linear(x[row : row + 1], packed.data_ptr(), n, alone[row : row + 1], bias=bias)
    for rows in range(1, 71):
        for threads in (kernels, single):
            for begin in {0, 70 - rows}:
                out = torch.empty(rows, n)
                threads.linear(x[begin : begin + rows], packed.data_ptr(), n, out, bias=bias)
                assert torch.equal(out, alone[begin : begin + rows])


def test_a_row_has_the_same_bits_beyond_one_block_of_rows(
    kernels: CpuKernels, single: CpuKernels
) -> None:
    x, weight = torch.randn(4096, 64), torch.randn(64, 64)
    whole = run(kernels, x, weight)
    for begin, end in [(0, 1), (239, 242), (1000, 1500), (4095, 4096)]:
        assert torch.equal(run(single, x[begin:end], weight), whole[begin:end])


def test_adds_to_its_own_residual_in_place(kernels: CpuKernels) -> None:
    x, weight, hidden = torch.randn(29, 48), torch.randn(80, 48), torch.randn(29, 80)
    want = run(kernels, x, weight, residual=hidden)
    packed = pack(kernels, weight)
    kernels.linear(x, packed.data_ptr(), 80, hidden, residual=hidden)
    assert torch.equal(hidden, want)


def test_writes_nothing_outside_its_output(kernels: CpuKernels) -> None:
    x, packed = torch.randn(5, 20), pack(kernels, torch.randn(37, 20))
    memory = torch.full((7, 37), 42.0)
    kernels.linear(x, packed.data_ptr(), 37, memory[1:6])
    assert (memory[0] == 42).all()
    assert (memory[6] == 42).all()


def test_packing_fills_the_promised_bytes_with_zero_padding(kernels: CpuKernels) -> None:
    width = kernels.panel_width
    weight = torch.randn(width + 3, 5)
    panels = pack(kernels, weight).view(2, 5, width)
    assert torch.equal(panels[0].T, weight[:width])
    assert torch.equal(panels[1].T[:3], weight[width:])
    assert not panels[1].T[3:].any()


def test_embedding_gathers_rows_of_the_packed_weight(kernels: CpuKernels) -> None:
    weight, ids = torch.randn(100, 37), torch.tensor([0, 99, 5, 5, 31, 32])
    out = torch.empty(6, 37)
    packed = pack(kernels, weight)
    kernels.embedding(packed.data_ptr(), 100, ids, out)
    assert torch.equal(out, weight[ids])


@pytest.mark.parametrize("wrong", [-1, 100])
def test_embedding_refuses_an_unknown_id(kernels: CpuKernels, wrong: int) -> None:
    packed, out = pack(kernels, torch.randn(100, 8)), torch.empty(2, 8)
    with pytest.raises(ValueError, match=f"token id {wrong} "):
        kernels.embedding(packed.data_ptr(), 100, torch.tensor([3, wrong]), out)


def test_arguments_that_do_not_fit_are_refused(kernels: CpuKernels) -> None:
    x, packed, out = torch.randn(4, 8), pack(kernels, torch.randn(32, 8)), torch.empty(4, 32)
    address = packed.data_ptr()
    with pytest.raises(ValueError, match="out must be"):
        kernels.linear(x, address, 32, torch.empty(4, 31))
    with pytest.raises(ValueError, match="x must be"):
        kernels.linear(x.double(), address, 32, out)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.linear(torch.randn(8, 4).T, address, 32, out)
    with pytest.raises(ValueError, match="bias must be"):
        kernels.linear(x, address, 32, out, bias=torch.zeros(31))
    with pytest.raises(ValueError, match="aligned"):
        kernels.linear(x, address + 4, 32, out)


def test_closed_kernels_refuse_to_work() -> None:
    kernels = CpuKernels(2)
    kernels.close()
    kernels.close()
    with pytest.raises(ValueError, match="closed"):
        kernels.linear(torch.ones(1, 1), aligned_floats(32).data_ptr(), 1, torch.ones(1, 1))
