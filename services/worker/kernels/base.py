"""What the model code needs of a device beside its decoder layers.

    how weights lie in memory     packed_nbytes, pack_weight
    the ends of the model         embedding, rms_norm, linear
    KV that travels               gather_blocks, scatter_blocks

`CpuKernels` packs matrices for its own GEMM; `TorchKernels` leaves them as they are. What a packed
matrix looks like is nobody else's affair: it is an address.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Kernels(Protocol):
    """Kernels of one device; used by the engine thread only."""

    @property
    def device(self) -> torch.device:
        """Where activations, weights and KV are."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of activations, weights and KV."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens of a KV block."""
        ...

    @property
    def panel_width(self) -> int:
        """Rows of a matrix that are packed together."""
        ...

    def packed_nbytes(self, n: int, k: int) -> int:
        """Bytes of a packed [n, k] weight."""
        ...

    def pack_weight(self, weight: torch.Tensor, dst: int) -> None:  # weight [n, k]
        """Write a packed weight at address `dst`."""
        ...

    def embedding(
        self,
        packed: int,
        num_embeddings: int,
        ids: torch.Tensor,  # [m] int64
        out: torch.Tensor,  # [m, k]
    ) -> None:
        """out[i] = w[ids[i]], w [num_embeddings, k] packed."""
        ...

    def rms_norm(
        self,
        x: torch.Tensor,  # [m, k]
        weight: torch.Tensor,  # [k]
        eps: float,
        out: torch.Tensor,  # [m, k], may be x
    ) -> None:
        """out = x / sqrt(mean(x ** 2) + eps) * weight, row by row."""
        ...

    def linear(
        self,
        x: torch.Tensor,  # [m, k]
        packed: int,
        n: int,
        out: torch.Tensor,  # [m, n], of any float type
    ) -> None:
        """out = x @ w.T, w packed."""
        ...

    def gather_blocks(
        self,
        caches: Sequence[torch.Tensor],  # of each layer [blocks, ...]; only mapped ones are touched
        block_table: Sequence[int],
        part: torch.Tensor,  # [num_layers * num_blocks * block_bytes] uint8
    ) -> None:
        """Copy the blocks `block_table` of each layer to `part`, layer after layer."""
        ...

    def scatter_blocks(
        self,
        caches: Sequence[torch.Tensor],  # as above
        block_table: Sequence[int],
        part: torch.Tensor,  # as above
    ) -> None:
        """Copy `part` to the blocks `block_table` of each layer."""
        ...

    def close(self) -> None:
        """Give back what the kernels hold; no method may be called afterwards."""
        ...
