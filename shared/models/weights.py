"""Writes the tensors of a GGUF file as fp32 into one safetensors file, a slice at a time.

    header length u64 | JSON {name: {dtype, shape, data_offsets}} padded with spaces | tensor data

The tensors of a layer lie side by side, in layer order, so that loading a layer reads one run of
the file. Memory stays at a few slices, whatever the size of the model.
Source: the safetensors format description.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from shared.models.architectures import TensorMapping
from shared.models.errors import ModelSourceError
from shared.models.gguf_file import GgufFile
from shared.models.progress import ProgressCallback

_FLOAT32_BYTES = 4
_SLICE_ELEMENTS = 1 << 22
_DATA_ALIGNMENT_BYTES = 64


def write_safetensors(
    file: GgufFile,
    mappings: Sequence[TensorMapping],
    path: Path,
    progress: ProgressCallback,
) -> None:
    """Dequantises every mapped tensor of `file` into `path`, bit-equal to the `gguf` package.

    Raises `ModelSourceError` when the disk is too small or a weight is not finite, and `OSError`
    when writing fails.
    """
    total_bytes = sum(_nbytes(mapping) for mapping in mappings)
    _require_space(path.parent, total_bytes)
    done_bytes = 0
    with path.open("wb") as output:
        output.write(_header(mappings))
        for mapping in mappings:
            for values in _slices(file, mapping):
                output.write(values.data)
                done_bytes += values.nbytes
                progress(done_bytes, total_bytes)


def _slices(file: GgufFile, mapping: TensorMapping) -> Iterator[NDArray[np.float32]]:
    """The rows of one tensor in their final order, as many at a time as fit a slice."""
    tensor = file.tensors[mapping.gguf_name]
    rows = file.raw_rows(tensor)  # [num_rows, row_bytes]
    order = mapping.row_order()
    if order is not None:
        rows = rows[order]  # blocks never cross rows, so this may come before dequantising
    step = max(1, _SLICE_ELEMENTS // tensor.shape[-1])
    kind = GGMLQuantizationType(tensor.quantization.type_id)
    for start in range(0, len(rows), step):
        values = np.ascontiguousarray(dequantize(rows[start : start + step], kind), "<f4")
        if not np.isfinite(values).all():
            raise ModelSourceError(
                f"{file.path} is corrupt: tensor {tensor.name} holds weights that are not finite;"
                " get the file again"
            )
        yield values


def _header(mappings: Sequence[TensorMapping]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for mapping in mappings:
        end = start + _nbytes(mapping)
        entries[mapping.hf_name] = {
            "dtype": "F32",
            "shape": list(mapping.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _DATA_ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text


def _nbytes(mapping: TensorMapping) -> int:
    return math.prod(mapping.shape) * _FLOAT32_BYTES


def _require_space(directory: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise ModelSourceError(
            f"converting the model needs {needed_bytes / 1e6:.0f} MB in {directory.parent}, where"
            f" {free_bytes / 1e6:.0f} MB are free; free some space or choose another cache"
            " directory"
        )
