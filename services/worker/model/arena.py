"""Where the tensors of one layer (or of the embedding, or the head) lie in its arena.

    arena of layer i, one range of addresses that never moves:
    +----------+-------------------+---------------+-----+-----------------+---------+
    | norm     | qkv (packed)      | o (packed)    | ... | gate_up (packed)| ...     |
    +----------+-------------------+---------------+-----+-----------------+---------+
    ^ address  ^ address + offset, each part on a 64-byte boundary

Dropping the layer unmaps the whole arena; restoring maps chunks at the same addresses and fills
them again. Matrices are packed for the GEMM (`services/worker/kernels`), vectors are plain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from services.worker.kernels.cpu import CpuKernels
from services.worker.memory.tensors import tensor_at

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class PartSpec:
    """One tensor of an arena. Matrices `[n, k]` are packed; several sources are stacked by rows."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]  # names of the checkpoint's tensors, stacked along dimension 0

    @property
    def is_packed(self) -> bool:
        return len(self.shape) == 2


class ArenaLayout:
    """Offsets of the parts of an arena."""

    def __init__(self, parts: Sequence[PartSpec], kernels: CpuKernels) -> None:
        self._kernels = kernels
        self._parts = {part.name: part for part in parts}
        self._offsets: dict[str, int] = {}
        position = 0
        for part in parts:
            self._offsets[part.name] = position
            position += -(-self._nbytes(part) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.nbytes = position

    def _nbytes(self, part: PartSpec) -> int:
        if part.is_packed:
            n, k = part.shape
            return self._kernels.packed_nbytes(n, k)
        return 4 * part.shape[0]

    def address(self, base_address: int, name: str) -> int:
        """Address of part `name` in an arena at `base_address`; 0 where it has no such part."""
        return base_address + self._offsets[name] if name in self._offsets else 0

    def fill(self, base_address: int, read: Callable[[str], torch.Tensor]) -> None:
        """Write a mapped arena.

        Args:
            read: gives a tensor of the checkpoint, float32, by the name in `PartSpec.sources`.
        """
        for part in self._parts.values():
            address = self.address(base_address, part.name)
            stacked = [read(name) for name in part.sources]
            value = stacked[0] if len(stacked) == 1 else torch.cat(stacked)
            if part.is_packed:
                self._kernels.pack_weight(value.contiguous(), address)
            else:
                tensor_at(address, part.shape).copy_(value)
