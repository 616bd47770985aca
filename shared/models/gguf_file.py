"""An open GGUF file: typed metadata fields and the raw bytes of tensors, straight from an mmap.

Called by the converter and by the tokenizer builder.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shared.models.errors import ModelSourceError
from shared.models.gguf_header import GgufTensor, HeaderCursor

_Scalar = TypeVar("_Scalar", int, float, bool, str)

_DEFAULT_ALIGNMENT = 32


class GgufFile:
    """An open GGUF file. Raises `ModelSourceError` for whatever is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = _map_file(path)
        cursor = HeaderCursor(path, self._bytes)
        num_tensors = cursor.file_header()
        self.metadata = cursor.metadata()
        self.tensors = cursor.tensors(num_tensors, self._alignment())
        split_count = self.optional("split.count", int, 0)
        if split_count > 1:
            raise ModelSourceError(
                f"{path} is one of {split_count} parts of a split GGUF; merge them into one file"
            )

    def required(self, key: str, kind: type[_Scalar]) -> _Scalar:
        """The metadata value of `key`; an error names the key when it is missing or mistyped."""
        value = self.metadata.get(key)
        if not isinstance(value, kind):
            raise self._unusable_field(key, kind.__name__)
        return value

    def optional(self, key: str, kind: type[_Scalar], default: _Scalar) -> _Scalar:
        """Like `required`, but `default` when the file does not have the key."""
        return self.required(key, kind) if key in self.metadata else default

    def required_list(self, key: str, kind: type[_Scalar]) -> list[_Scalar]:
        """The metadata array of `key`, whose items are of type `kind`."""
        values = self.metadata.get(key)
        if not isinstance(values, list):
            raise self._unusable_field(key, f"list of {kind.__name__}")
        items = [value for value in values if isinstance(value, kind)]
        if len(items) != len(values):
            raise self._unusable_field(key, f"list of {kind.__name__}")
        return items

    def raw_rows(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        """The stored bytes of a tensor, `[num_rows, row_bytes]`, a view of the mapped file."""
        flat = np.frombuffer(
            self._bytes, np.uint8, tensor.num_rows * tensor.row_bytes, tensor.offset_bytes
        )
        return flat.reshape(tensor.num_rows, tensor.row_bytes)

    def _unusable_field(self, key: str, expected: str) -> ModelSourceError:
        state = "another type" if key in self.metadata else "missing"
        return ModelSourceError(
            f"{self.path}: the GGUF field {key} must be a {expected} but is {state};"
            " use a complete file of a supported model"
        )

    def _alignment(self) -> int:
        alignment = self.optional("general.alignment", int, _DEFAULT_ALIGNMENT)
        if alignment <= 0 or alignment & (alignment - 1):
            raise ModelSourceError(
                f"{self.path} is corrupt: its alignment is {alignment}; get the file again"
            )
        return alignment


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise ModelSourceError(f"{path} is empty; get the file again") from error
    except OSError as error:
        raise ModelSourceError(f"cannot read {path}: {error.strerror}") from error
