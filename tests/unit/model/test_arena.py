"""An arena holds every part at an aligned place of its own, and filling writes exactly that."""

from __future__ import annotations

import ctypes

import pytest
import torch

from services.worker.kernels.cpu import CpuKernels
from services.worker.model.arena import ArenaLayout, PartSpec

PARTS = [
    PartSpec("norm", (33,), ("norm.weight",)),
    PartSpec("qkv", (70, 33), ("q.weight", "k.weight", "v.weight")),
    PartSpec("qkv_bias", (70,), ("q.bias", "k.bias", "v.bias")),
]


def checkpoint() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    rows = {"q": 40, "k": 15, "v": 15}
    tensors = {f"{name}.weight": torch.randn(count, 33) for name, count in rows.items()}
    tensors |= {f"{name}.bias": torch.randn(count) for name, count in rows.items()}
    return tensors | {"norm.weight": torch.randn(33)}


@pytest.fixture
def layout(kernels: CpuKernels) -> ArenaLayout:
    return ArenaLayout(PARTS, kernels)


def filled(layout: ArenaLayout) -> torch.Tensor:
    """Memory of the arena with a guard behind it."""
    memory = torch.full((layout.nbytes // 4 + 64,), 7.0)
    num_bytes = sum(layout.fill(memory.data_ptr(), checkpoint().__getitem__))
    assert 0 < num_bytes <= layout.nbytes
    return memory


def test_parts_do_not_overlap_and_are_aligned(layout: ArenaLayout, kernels: CpuKernels) -> None:
    sizes = {"norm": 4 * 33, "qkv": kernels.packed_nbytes(70, 33), "qkv_bias": 4 * 70}
    end = 0
    for name, nbytes in sizes.items():
        address = layout.address(4096, name)
        assert address % 64 == 0
        assert address >= 4096 + end
        end = address - 4096 + nbytes
    assert end <= layout.nbytes


def test_vectors_are_stacked_as_they_are(layout: ArenaLayout) -> None:
    memory, tensors = filled(layout), checkpoint()
    start = layout.address(0, "qkv_bias") // 4
    stacked = torch.cat([tensors["q.bias"], tensors["k.bias"], tensors["v.bias"]])
    assert torch.equal(memory[start : start + 70], stacked)
    assert torch.equal(memory[: memory.numel()][:33], tensors["norm.weight"])


def test_a_stacked_matrix_multiplies_like_its_parts(
    layout: ArenaLayout, kernels: CpuKernels
) -> None:
    memory, tensors = filled(layout), checkpoint()
    x, out = torch.randn(3, 33), torch.empty(3, 70)
    kernels.linear(x, layout.address(memory.data_ptr(), "qkv"), 70, out)
    expected = torch.cat([x @ tensors[f"{name}.weight"].T for name in "qkv"], dim=1)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_matrix_is_filled_in_pieces(kernels: CpuKernels, dtype: torch.dtype) -> None:
    """Pieces end neither where its sources do nor where it does itself."""
    torch.manual_seed(2)
    sources = {"a": torch.randn(4001, 33).to(dtype), "b": torch.randn(5005, 33).to(dtype)}
    layout = ArenaLayout([PartSpec("w", (9006, 33), ("a", "b"))], kernels)
    in_pieces, at_once = torch.zeros(2, layout.nbytes // 4 + 16)
    aligned = [-(-memory.data_ptr() // 64) * 64 for memory in (in_pieces, at_once)]
    pieces = list(layout.fill(aligned[0], sources.__getitem__))
    assert len(pieces) > 2
    kernels.pack_weight(torch.cat(list(sources.values())).float(), aligned[1])
    values = [ctypes.string_at(address, layout.nbytes) for address in aligned]
    assert values[0] == values[1]


def test_nothing_is_written_behind_the_arena(layout: ArenaLayout) -> None:
    memory = filled(layout)
    assert (memory[layout.nbytes // 4 :] == 7.0).all()


def test_absent_parts_have_no_address(layout: ArenaLayout) -> None:
    assert layout.address(4096, "o_bias") == 0
