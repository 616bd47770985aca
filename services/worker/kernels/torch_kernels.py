"""Kernels of a CUDA worker: cuBLAS through torch, and `LayerOps` for all that is not a product.

Weights lie in memory as they are in the checkpoint, in the type of the computation. Nothing here is
bound to CUDA: with the right `LayerOps` it runs on any device of torch, as it does in tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.worker.kernels.ops import LayerOps
from services.worker.memory.tensors import tensor_at

BLOCK_SIZE = 16


class TorchKernels:
    """Implements `Kernels`."""

    panel_width = 1

    def __init__(self, device: torch.device, dtype: torch.dtype, ops: LayerOps) -> None:
        self.device = device
        self.dtype = dtype
        self.ops = ops
        self.block_size = BLOCK_SIZE
        #: Profiles that were measured with other kernels do not count.
        self.build_id = f"torch {torch.__version__} {_device_name(device)} {dtype}"
        self.num_threads = 1

    def packed_nbytes(self, n: int, k: int) -> int:
        """Bytes of an [n, k] weight."""
        return n * k * self.dtype.itemsize

    def pack_weight(self, weight: torch.Tensor, dst: int) -> None:  # weight [n, k]
        """Copy a weight to address `dst`."""
        tensor_at(dst, weight.shape, self.dtype, self.device).copy_(weight)

    def embedding(
        self,
        packed: int,
        num_embeddings: int,
        ids: torch.Tensor,  # [m] int64
        out: torch.Tensor,  # [m, k]
    ) -> None:
        """out[i] = w[ids[i]]."""
        table = tensor_at(packed, (num_embeddings, out.shape[1]), self.dtype, self.device)
        torch.index_select(table, 0, ids, out=out)

    def rms_norm(
        self,
        x: torch.Tensor,  # [m, k]
        weight: torch.Tensor,  # [k]
        eps: float,
        out: torch.Tensor,  # [m, k], may be x
    ) -> None:
        """out = x / sqrt(mean(x ** 2) + eps) * weight, row by row."""
        self.ops.rms_norm(x, weight, eps, out)

    def linear(
        self,
        x: torch.Tensor,  # [m, k]
        packed: int,
        n: int,
        out: torch.Tensor,  # [m, n], of any float type
    ) -> None:
        """out = x @ w.T."""
        weight = tensor_at(packed, (n, x.shape[1]), self.dtype, self.device)
        out.copy_(torch.nn.functional.linear(x, weight))

    def gather_blocks(
        self, caches: Sequence[torch.Tensor], block_table: Sequence[int], part: torch.Tensor
    ) -> None:
        """Copy the blocks of each layer to `part` [num_layers * num_blocks * block_bytes]."""
        self.ops.gather_blocks(caches, block_table, part)

    def scatter_blocks(
        self, caches: Sequence[torch.Tensor], block_table: Sequence[int], part: torch.Tensor
    ) -> None:
        """Copy `part` to the blocks of each layer."""
        self.ops.scatter_blocks(caches, block_table, part)

    def close(self) -> None:
        """Nothing is held."""


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
