"""Tensors over mapped memory, without copying: where torch meets the addresses of the pool."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch


def tensor_at(
    address: int, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A contiguous CPU tensor of `shape` whose first element lies at `address`.

    The tensor does not own its memory and does not keep it mapped: it may exist while its range is
    unmapped, but may be read or written only while it is mapped, and must be gone before the range
    is closed. Reading it at another time ends the process.

    Raises:
        ValueError: a shape without elements, or an address not aligned for `dtype`.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes <= 0:
        raise ValueError(f"a tensor of shape {tuple(shape)} has no elements")
    if address % dtype.itemsize:
        raise ValueError(f"address {address:#x} is not aligned for {dtype}")
    buffer = (ctypes.c_byte * nbytes).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).view(tuple(shape))
