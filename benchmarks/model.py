"""The model that a benchmark runs with, given as `--model` of `kunserve` takes it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from shared.cache_dir import default_cache_dir
from shared.models import ProgressReporter, resolve_model, resolve_tokenizer

DEFAULT_MODEL = "builtin:smollm2"


def model_directory(spec: str) -> Path:
    """The safetensors directory of `spec`, converted now if it was not before."""
    progress = ProgressReporter(sys.stderr, f"converting {spec}")
    return resolve_model(spec, default_cache_dir(os.environ), progress)


def tokenizer_directory(spec: str) -> Path:
    """The directory with the tokenizer of `spec`."""
    return resolve_tokenizer(spec, default_cache_dir(os.environ))
