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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from services.worker.kernels.base import Kernels
from services.worker.memory.tensors import tensor_at

_ALIGNMENT_BYTES = 64
#: What is written in one go, some panels at least: less than a millisecond of work.
_PIECE_BYTES = 512 * 1024


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

    def __init__(self, parts: Sequence[PartSpec], kernels: Kernels) -> None:
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
        return self._kernels.dtype.itemsize * part.shape[0]

    def address(self, base_address: int, name: str) -> int:
        """Address of part `name` in an arena at `base_address`; 0 where it has no such part."""
        return base_address + self._offsets[name] if name in self._offsets else 0

    def view(self, base_address: int, name: str) -> torch.Tensor:
        """Part `name` of an arena as a tensor; not for one that is packed in a way of its own."""
        part, kernels = self._parts[name], self._kernels
        return tensor_at(
            self.address(base_address, name), part.shape, kernels.dtype, kernels.device
        )

    def fill(self, base_address: int, read: Callable[[str], torch.Tensor]) -> Iterator[int]:
        """Write a mapped arena, piece by piece: it is whole when the iterator is exhausted.

        Args:
            read: gives a tensor of the checkpoint, of any float type, by the name in
                `PartSpec.sources`; a view of a mapped file is read as its pieces are.

        Yields the bytes of each piece after it was written.
        """
        for part in self._parts.values():
            address = self.address(base_address, part.name)
            sources = [read(name) for name in part.sources]
            if part.is_packed:
                yield from self._pack(part, address, sources)
            else:
                self.view(base_address, part.name).copy_(torch.cat(sources))
                yield self._nbytes(part)

    def _pack(self, part: PartSpec, address: int, sources: list[torch.Tensor]) -> Iterator[int]:
        """Pack a matrix some panels at a time; a panel's rows are neighbours."""
        n, k = part.shape
        panel_bytes = self._kernels.packed_nbytes(1, k)
        num_panels = max(1, _PIECE_BYTES // panel_bytes)
        num_rows = num_panels * self._kernels.panel_width
        for start in range(0, n, num_rows):
            rows = _rows(sources, start, min(start + num_rows, n))
            self._kernels.pack_weight(rows.to(self._kernels.dtype).contiguous(), address)
            nbytes = self._kernels.packed_nbytes(len(rows), k)
            address += nbytes
            yield nbytes


def _rows(sources: Sequence[torch.Tensor], start: int, end: int) -> torch.Tensor:
    """Rows `[start, end)` of the sources stacked; a view where they lie in one of them."""
    pieces = []
    for source in sources:
        if start < len(source) and end > 0:
            pieces.append(source[max(start, 0) : end])
        start, end = start - len(source), end - len(source)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
