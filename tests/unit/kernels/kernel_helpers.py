"""Memory and batches for kernel tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.worker.kernels.cpu import AttentionBatch, CpuKernels
from services.worker.kernels.library import LayerGeometry

BLOCK_SIZE = 16


def aligned_floats(count: int) -> torch.Tensor:
    """[count] fp32 at a 64-byte boundary, full of NaN."""
    spare = torch.full((count + 16,), torch.nan)
    first = (-spare.data_ptr() // 4) % 16
    return spare[first : first + count]


def pack(kernels: CpuKernels, weight: torch.Tensor) -> torch.Tensor:
    """The packed copy; its data_ptr() is what the kernels take."""
    packed = aligned_floats(kernels.packed_nbytes(*weight.shape) // 4)
    kernels.pack_weight(weight, packed.data_ptr())
    return packed


def geometry(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    sliding_window: int = 0,
    hidden_size: int = 0,
    intermediate_size: int = 0,
    rms_norm_eps: float = 1e-5,
) -> LayerGeometry:
    return LayerGeometry(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        sliding_window=sliding_window,
        rms_norm_eps=rms_norm_eps,
        scale=head_dim**-0.5,
    )


@dataclass
class Pages:
    """Sequences in shuffled blocks of one layer's KV; rows that no token uses are NaN."""

    kv: torch.Tensor  # [blocks, 2, BLOCK_SIZE, kv_heads, head_dim]
    block_table: torch.Tensor  # [num_seqs, max_blocks] int32

    @classmethod
    def empty(cls, capacities: list[int], kv_heads: int, head_dim: int) -> Pages:
        """Room for capacities[s] tokens of sequence s, all NaN."""
        counts = [-(-capacity // BLOCK_SIZE) for capacity in capacities]
        ids = torch.randperm(sum(counts) + 3).int()
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        taken = 0
        for s, count in enumerate(counts):
            table[s, :count] = ids[taken : taken + count]
            taken += count
        shape = (len(ids), 2, BLOCK_SIZE, kv_heads, head_dim)
        return cls(aligned_floats(torch.Size(shape).numel()).view(shape), table)

    def slots(self, sequence: int, begin: int, end: int) -> torch.Tensor:
        positions = torch.arange(begin, end)
        blocks = self.block_table[sequence].long()[positions // BLOCK_SIZE]
        return blocks * BLOCK_SIZE + positions % BLOCK_SIZE

    def fill(self, lengths: list[int]) -> None:
        """Random K and V for the first lengths[s] tokens of each sequence."""
        for s, length in enumerate(lengths):
            slots = self.slots(s, 0, length)
            shape = (length, 2, *self.kv.shape[3:])
            self.kv[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = torch.randn(shape)


def batch_of(
    pages: Pages,
    spans: list[tuple[int, int, int]],
    cos: torch.Tensor | None = None,  # [positions, head_dim]
    sin: torch.Tensor | None = None,
) -> AttentionBatch:
    """Tokens [begin, end) of a sequence for each (sequence, begin, end), in that order."""
    positions = torch.cat([torch.arange(begin, end) for _, begin, end in spans])
    lengths = torch.tensor([0] + [end - begin for _, begin, end in spans])
    table = torch.zeros(len(positions), pages.kv.shape[-1])
    return AttentionBatch(
        cos=table if cos is None else cos[positions],
        sin=table if sin is None else sin[positions],
        slot_mapping=torch.cat([pages.slots(*span) for span in spans]),
        block_table=pages.block_table[[s for s, _, _ in spans]].contiguous(),
        cu_seqlens_q=lengths.cumsum(0).int(),
        seqused_k=torch.tensor([end for _, _, end in spans], dtype=torch.int32),
    )
