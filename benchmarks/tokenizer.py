"""The tokenizer of a Hugging Face model directory, for cutting prompts to length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from shared.errors import ConfigError


class FileTokenizer:
    """A `tokenizer.json`; fits `benchmarks.workload.Tokenizer`."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(f"there is no tokenizer at {path}")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text


def load_tokenizer(model_dir: Path) -> FileTokenizer:
    """Load the tokenizer of `model_dir`; raises ConfigError where there is none."""
    return FileTokenizer(model_dir / "tokenizer.json")
