"""Tensors over mapped memory, without copying: where torch meets the addresses of the pool.

    DLManagedTensor, from malloc        { address, device, type, shape } --> torch.from_dlpack
         deleter = libc's free               called when the last view is gone

DLPack takes an address at its word: neither side looks at the memory, which may be unmapped at that
moment. (CuPy's own export asks the CUDA runtime about the address, which has no answer then.)
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch.utils.dlpack import from_dlpack

_CPU = torch.device("cpu")
_DEVICE_TYPES = {"cpu": 1, "cuda": 2}  # DLDeviceType
_INT, _UINT, _FLOAT, _BFLOAT = 0, 1, 2, 4  # DLDataTypeCode
_TYPE_CODES = {
    torch.uint8: _UINT,
    torch.int32: _INT,
    torch.int64: _INT,
    torch.float16: _FLOAT,
    torch.bfloat16: _BFLOAT,
    torch.float32: _FLOAT,
}
_CAPSULE_NAME = b"dltensor"  # the capsule keeps a pointer to it


class _DLManagedTensor(ctypes.Structure):
    """DLManagedTensor of dlpack.h, with the DLTensor it begins with spelt out."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


_LIBC = ctypes.CDLL(None)
_LIBC.malloc.restype = ctypes.c_void_p
_LIBC.malloc.argtypes = [ctypes.c_size_t]
_FREE = ctypes.cast(_LIBC.free, ctypes.c_void_p).value
_NEW_CAPSULE = ctypes.pythonapi.PyCapsule_New
_NEW_CAPSULE.restype = ctypes.py_object
_NEW_CAPSULE.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def tensor_at(
    address: int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device = _CPU,
) -> torch.Tensor:
    """A contiguous tensor of `shape` on `device` whose first element lies at `address`.

    The tensor does not own its memory and does not keep it mapped: it may exist while its range is
    unmapped, but may be read or written only while it is mapped, and must be gone before the range
    is closed. Reading it at another time ends the process.

    Raises:
        ValueError: a shape without elements, or an address not aligned for `dtype`.
    """
    if math.prod(shape) <= 0:
        raise ValueError(f"a tensor of shape {tuple(shape)} has no elements")
    if address % dtype.itemsize:
        raise ValueError(f"address {address:#x} is not aligned for {dtype}")
    tensor: torch.Tensor = from_dlpack(_capsule(address, shape, dtype, device))
    return tensor


def _capsule(
    address: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> object:
    """A DLPack capsule; whoever consumes it frees it."""
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    block = _LIBC.malloc(ctypes.sizeof(_DLManagedTensor) + ctypes.sizeof(sizes))
    if not block:
        raise MemoryError("no memory for the description of a tensor")
    shape_address = block + ctypes.sizeof(_DLManagedTensor)
    ctypes.memmove(shape_address, sizes, ctypes.sizeof(sizes))
    managed = _DLManagedTensor.from_address(block)
    managed.data = address
    managed.device_type, managed.device_id = _DEVICE_TYPES[device.type], device.index or 0
    managed.ndim, managed.shape = len(shape), shape_address
    managed.type_code, managed.type_bits = _TYPE_CODES[dtype], 8 * dtype.itemsize
    managed.type_lanes, managed.byte_offset = 1, 0
    managed.strides = managed.manager_ctx = None  # no strides: contiguous
    managed.deleter = _FREE
    return _NEW_CAPSULE(block, _CAPSULE_NAME, None)
