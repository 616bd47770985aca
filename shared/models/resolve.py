"""Turns what the user gave as `--model` into a local Hugging Face directory.

Workers call `resolve_model`, routers `resolve_tokenizer`. A directory is checked and used where it
is. A GGUF file is converted once:

    <cache>/models/<key>/        config.json generation_config.json tokenizer.json
                                 tokenizer_config.json model.safetensors (fp32)
    <cache>/tokenizers/<key>/    the same without the weights
"""

from __future__ import annotations

import json
from pathlib import Path

from shared.models.architectures import GgufModel
from shared.models.cache import build_once
from shared.models.gguf_file import GgufFile
from shared.models.progress import ProgressCallback
from shared.models.source import (
    SINGLE_FILE,
    SourceKind,
    check_directory,
    check_tokenizer_directory,
    find_source,
)
from shared.models.vocabulary import generation_config, write_tokenizer
from shared.models.weights import write_safetensors

CONVERTER_VERSION = 1
"""Part of every cache key: raise it whenever the converter writes something else."""

_MODEL_DEADLINE_SECONDS = 1800.0
_TOKENIZER_DEADLINE_SECONDS = 60.0


def resolve_model(
    spec: str,
    cache_dir: Path,
    progress: ProgressCallback,
    *,
    deadline_seconds: float = _MODEL_DEADLINE_SECONDS,
) -> Path:
    """The directory with config, tokenizer and safetensors weights of the model `spec`.

    `progress` is called while weights are converted, and not at all when that has been done.
    `deadline_seconds` bounds the wait for another process that converts the same model.
    Raises `ModelSourceError`.
    """
    source = find_source(spec)
    if source.kind is SourceKind.DIRECTORY:
        check_directory(source.path)
        return source.path

    def build(directory: Path) -> None:
        file = GgufFile(source.path)
        model = GgufModel.read(file)
        mappings = model.tensor_mappings()
        _write_texts(model, directory)
        write_safetensors(file, mappings, directory / SINGLE_FILE, progress)

    entry = cache_dir / "models" / source.cache_key(CONVERTER_VERSION)
    return build_once(entry, build, deadline_seconds=deadline_seconds)


def resolve_tokenizer(
    spec: str, cache_dir: Path, *, deadline_seconds: float = _TOKENIZER_DEADLINE_SECONDS
) -> Path:
    """The directory with config and tokenizer of the model `spec`; never touches weights.

    Raises `ModelSourceError`.
    """
    source = find_source(spec)
    if source.kind is SourceKind.DIRECTORY:
        check_tokenizer_directory(source.path)
        return source.path

    def build(directory: Path) -> None:
        _write_texts(GgufModel.read(GgufFile(source.path)), directory)

    entry = cache_dir / "tokenizers" / source.cache_key(CONVERTER_VERSION)
    return build_once(entry, build, deadline_seconds=deadline_seconds)


def _write_texts(model: GgufModel, directory: Path) -> None:
    ids = generation_config(model.file)
    _write_json(directory / "config.json", {**model.hf_config(), **ids})
    _write_json(directory / "generation_config.json", ids)
    write_tokenizer(model.file, directory)


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
