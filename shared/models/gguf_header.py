"""The header of a GGUF file: metadata fields and the table of tensors, every read bounds-checked.

Called by `gguf_file`. The `gguf` package has a reader too, but it makes one numpy view per string
and takes seconds for a vocabulary, which is all that a router needs of the file.

    magic "GGUF" | version u32 | tensor count u64 | metadata count u64
    metadata:  key string | type u32 | value            (string = length u64 + UTF-8 bytes)
    tensors:   name string | rank u32 | dims u64 x rank, fastest first | type u32 | offset u64
    padding to `general.alignment`
    data:      each tensor at its offset from here

Source: the GGUF specification, versions 2 and 3 (same layout, little endian).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from shared.models.errors import ModelSourceError

MetadataValue = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

_MAGIC = b"GGUF"
_MAX_RANK = 4
_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate("BbHhIif?")) | dict(enumerate("Qqd", start=10))
"""Format character of `struct` for each scalar value type."""


@dataclass(frozen=True)
class Quantization:
    """How a tensor is stored: `block_elements` consecutive numbers in `block_bytes` bytes."""

    type_id: int
    name: str
    block_elements: int
    block_bytes: int


QUANTIZATIONS = {
    q.type_id: q
    for q in (
        Quantization(0, "F32", 1, 4),
        Quantization(1, "F16", 1, 2),
        Quantization(2, "Q4_0", 32, 18),
        Quantization(3, "Q4_1", 32, 20),
        Quantization(6, "Q5_0", 32, 22),
        Quantization(7, "Q5_1", 32, 24),
        Quantization(8, "Q8_0", 32, 34),
        Quantization(10, "Q2_K", 256, 84),
        Quantization(11, "Q3_K", 256, 110),
        Quantization(12, "Q4_K", 256, 144),
        Quantization(13, "Q5_K", 256, 176),
        Quantization(14, "Q6_K", 256, 210),
        Quantization(20, "IQ4_NL", 32, 18),
        Quantization(23, "IQ4_XS", 256, 136),
        Quantization(30, "BF16", 1, 2),
    )
}


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies; `shape` is in row-major order, the last dimension contiguous."""

    name: str
    shape: tuple[int, ...]
    quantization: Quantization
    offset_bytes: int

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.quantization.block_elements * self.quantization.block_bytes


class HeaderCursor:
    """Reads forward through a header; raises `ModelSourceError` rather than leave the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._position = 0

    def file_header(self) -> int:
        """Checks magic and version and returns the number of tensors."""
        magic = self._data[: len(_MAGIC)]
        if magic != _MAGIC:
            raise ModelSourceError(
                f"{self._path} is not a GGUF file: it starts with {magic!r} instead of {_MAGIC!r}"
            )
        self._position = len(_MAGIC)
        version = self._unpack("I")
        if version not in (2, 3):
            raise ModelSourceError(
                f"{self._path} has GGUF version {version}; little-endian versions 2 and 3 are read"
            )
        num_tensors = int(self._unpack("Q"))
        self._num_fields = int(self._unpack("Q"))
        return num_tensors

    def metadata(self) -> dict[str, MetadataValue]:
        """The fields, which come right after the counts."""
        fields: dict[str, MetadataValue] = {}
        for _ in range(self._num_fields):
            key = self._string()
            fields[key] = self._value(self._unpack("I"))
        return fields

    def tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        """The table of tensors, which comes last; checks that their data are in the file."""
        entries = [self._tensor() for _ in range(count)]
        start = -(-self._position // alignment) * alignment
        placed: dict[str, GgufTensor] = {}
        for entry in entries:
            tensor = GgufTensor(
                entry.name, entry.shape, entry.quantization, start + entry.offset_bytes
            )
            end = tensor.offset_bytes + tensor.num_rows * tensor.row_bytes
            if end > self._size:
                raise self._corrupt(f"tensor {entry.name} ends at byte {end} of {self._size}")
            if entry.name in placed:
                raise self._corrupt(f"tensor {entry.name} is there twice")
            placed[entry.name] = tensor
        return placed

    def _tensor(self) -> GgufTensor:
        name = self._string()
        rank = self._unpack("I")
        if not 1 <= rank <= _MAX_RANK:
            raise self._corrupt(f"tensor {name} has {rank} dimensions")
        shape = tuple(int(self._unpack("Q")) for _ in range(rank))[::-1]
        type_id = self._unpack("I")
        offset = int(self._unpack("Q"))
        quantization = QUANTIZATIONS.get(int(type_id))
        if quantization is None:
            known = ", ".join(q.name for q in QUANTIZATIONS.values())
            raise ModelSourceError(
                f"{self._path}: tensor {name} has the unsupported quantisation type {type_id};"
                f" supported are {known}"
            )
        if min(shape) < 1 or shape[-1] % quantization.block_elements:
            raise self._corrupt(f"tensor {name} of type {quantization.name} has shape {shape}")
        return GgufTensor(name, shape, quantization, offset)

    def _value(self, kind: int | float) -> MetadataValue:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        return self._unpack(self._scalar_code(kind))

    def _array(self) -> list[int] | list[float] | list[bool] | list[str]:
        kind, count = self._unpack("I"), int(self._unpack("Q"))
        if kind == _STRING:
            self._require(count * 8)
            return [self._string() for _ in range(count)]
        code = self._scalar_code(kind)
        position = self._advance(count * struct.calcsize(f"<{code}"))
        return list(struct.unpack_from(f"<{count}{code}", self._data, position))

    def _string(self) -> str:
        length = int(self._unpack("Q"))
        position = self._advance(length)
        try:
            return self._data[position : position + length].decode()
        except UnicodeDecodeError as error:
            raise self._corrupt(f"the text at byte {position} is not UTF-8") from error

    def _scalar_code(self, kind: int | float) -> str:
        code = _SCALARS.get(int(kind))
        if code is None:
            raise self._corrupt(f"unknown value type {kind} before byte {self._position}")
        return code

    def _unpack(self, code: str) -> int:
        position = self._advance(struct.calcsize(f"<{code}"))
        value: int = struct.unpack_from(f"<{code}", self._data, position)[0]
        return value

    def _advance(self, length: int) -> int:
        self._require(length)
        position = self._position
        self._position += length
        return position

    def _require(self, length: int) -> None:
        if length > self._size - self._position:
            raise self._corrupt(
                f"{length} bytes are announced at byte {self._position} of {self._size}"
            )

    def _corrupt(self, what: str) -> ModelSourceError:
        return ModelSourceError(f"{self._path} is truncated or corrupt: {what}; get the file again")
