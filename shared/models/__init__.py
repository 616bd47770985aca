"""Finding a model and turning it into a local Hugging Face directory; knows no torch."""

from __future__ import annotations

from shared.models.errors import ModelSourceError
from shared.models.progress import ProgressCallback, ProgressReporter
from shared.models.resolve import resolve_model, resolve_tokenizer

__all__ = [
    "ModelSourceError",
    "ProgressCallback",
    "ProgressReporter",
    "resolve_model",
    "resolve_tokenizer",
]
