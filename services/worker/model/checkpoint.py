"""An index of a safetensors directory by decoder layer; tensors are read through mmap when asked.

Called by the worker's weight store, which takes exactly the layers of its span and takes dropped
layers again when they come back. Opening reads headers only and compares every tensor's name and
shape with the `ModelConfig`, so that a wrong checkpoint is refused before any memory is planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from services.worker.model.config import ModelConfig
from services.worker.model.layers.factory import layer_shapes
from shared.errors import ConfigError
from shared.models.errors import ModelSourceError
from shared.models.source import INDEX_FILE, SINGLE_FILE, check_directory, read_json_object

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _TensorHeader(Protocol):
    """One tensor of an open safetensors file, not read yet."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...


class _SafetensorsFile(Protocol):
    """The typed part of `safe_open` that is used here."""

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> _TensorHeader: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


class WeightSource(Protocol):
    """Where a stage takes the tensors of a model from; a `Checkpoint` is one."""

    @property
    def config(self) -> ModelConfig:
        """The model that the tensors belong to."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor with this full name, on any device and of any float type."""
        ...

    def release(self) -> None:
        """No more tensors are wanted for now."""
        ...


class CheckpointError(ConfigError):
    """A checkpoint is incomplete, damaged or of another shape; names the tensor and the file."""


@dataclass(frozen=True)
class StoredTensor:
    """What the header of `file` says about one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """The tensors of one model on disk. Build it with `open`; the files must stay as they are.

    Tensors come as stored, as views of the mapped file that must not be written to, unless a
    `dtype` asks for a conversion. Files are mapped when a tensor is read, until `release`.
    """

    def __init__(self, config: ModelConfig, index: Mapping[str, StoredTensor]) -> None:
        self.config = config
        self._index = index
        self._files: dict[Path, _SafetensorsFile] = {}

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Opens the model directory `path` and checks it against its own config.json.

        Raises `CheckpointError` for the weights and `ConfigError` for the config.
        """
        config = ModelConfig.from_directory(path)
        expected = dict(tensor_shapes(config))
        index: dict[str, StoredTensor] = {}
        for file in _weight_files(path):
            index.update(_read_header(file, _open_file(file), expected))
        _check_shapes(index, expected, path)
        return cls(config, index)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor with this full name, in `dtype` or as stored."""
        stored = self._index[name]
        if stored.file not in self._files:
            self._files[stored.file] = _open_file(stored.file)
        try:
            tensor = self._files[stored.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read tensor {name} of {stored.file}: {error}") from error
        return tensor if dtype is None else tensor.to(dtype)

    def release(self) -> None:
        """Unmap the files, as soon as no tensor uses them; what was read no longer takes memory."""
        self._files.clear()


def _layer_tensor(layer: int, short_name: str) -> str:
    return f"model.layers.{layer}.{short_name}"


def _weight_files(path: Path) -> list[Path]:
    try:
        check_directory(path)
        if (path / SINGLE_FILE).is_file():
            return [path / SINGLE_FILE]
        weight_map = read_json_object(path / INDEX_FILE)["weight_map"]
    except ModelSourceError as error:
        raise CheckpointError(str(error)) from error
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return [path / name for name in sorted({str(name) for name in names})]


def _open_file(file: Path) -> _SafetensorsFile:
    try:
        handle: _SafetensorsFile = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or is not a safetensors file ({error}); get it again"
        ) from error
    return handle


def _read_header(
    file: Path, handle: _SafetensorsFile, expected: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, StoredTensor]]:
    for name in expected.keys() & set(handle.keys()):
        entry = handle.get_slice(name)
        dtype = _DTYPES.get(entry.get_dtype())
        if dtype is None:
            raise CheckpointError(
                f"tensor {name} of {file} has type {entry.get_dtype()}; supported are"
                f" {', '.join(_DTYPES)}"
            )
        yield name, StoredTensor(file, tuple(entry.get_shape()), dtype)


def _check_shapes(
    index: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    for name, shape in expected.items():
        stored = index.get(name)
        if stored is None:
            raise CheckpointError(
                f"{path} has no tensor {name}, which its config.json calls for; copy the complete"
                " model"
            )
        if stored.shape != shape:
            raise CheckpointError(
                f"tensor {name} of {stored.file} has shape {list(stored.shape)}, but config.json"
                f" calls for {list(shape)}; config and weights are of different models"
            )


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Full name and shape of every tensor of a model."""
    matrix = (config.vocab_size, config.hidden_size)
    yield EMBEDDING, matrix
    for layer in range(config.num_layers):
        for short, shape in layer_shapes(config).items():
            yield _layer_tensor(layer, short), shape
    yield FINAL_NORM, (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield LM_HEAD, matrix
