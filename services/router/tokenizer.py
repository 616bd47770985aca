"""The model's tokenizer, chat template and generation defaults, read from its directory.

Built once at start from `tokenizer.json`, `tokenizer_config.json`, `config.json` and
`generation_config.json`; immutable afterwards. Uses the `tokenizers` library directly.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders

from services.router.chat_template import ChatTemplate
from services.router.detokenizer import (
    ByteLevelDecoder,
    TextDecoder,
    WindowDecoder,
    byte_level_table,
)
from shared.errors import ConfigError

#: Longer texts are tokenised in a thread, so that running streams do not wait for them.
_INLINE_CHARACTERS = 2048
_DEFAULT_CONTEXT_TOKENS = 2048
_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ModelFacts:
    """What the model's configuration files say; `directory` is where they are."""

    directory: Path
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    sampling_defaults: dict[str, float]


class ModelTokenizer:
    """Text to token ids and back, for one model."""

    def __init__(
        self, tokenizer: Tokenizer, facts: ModelFacts, chat_template: ChatTemplate | None
    ) -> None:
        self._tokenizer = tokenizer
        self.facts = facts
        self.chat_template = chat_template
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self._longest_token = max(len(token) for token in vocabulary)
        self._special_ids = frozenset(
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        self._byte_table = (
            byte_level_table(tokenizer)
            if isinstance(tokenizer.decoder, decoders.ByteLevel)
            else None
        )

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the tokens of `text`, for refusing huge prompts before tokenising."""
        return len(text) // self._longest_token

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`."""
        if len(text) <= _INLINE_CHARACTERS:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of `token_ids`."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, part of a character or more (for logprobs)."""
        if self._byte_table is not None and token_id < len(self._byte_table):
            return self._byte_table[token_id]
        return self.decode([token_id], skip_special_tokens=False).encode()

    def new_decoder(self, *, skip_special_tokens: bool) -> TextDecoder:
        """A decoder for one request's output."""
        if self._byte_table is not None:
            skipped = self._special_ids if skip_special_tokens else frozenset()
            return ByteLevelDecoder(self._byte_table, skipped)
        return WindowDecoder(self._tokenizer, skip_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        token_ids: list[int] = encoding.ids
        return token_ids


def load_tokenizer(directory: Path) -> ModelTokenizer:
    """Read the files of `directory`.

    Raises:
        ConfigError: a file is missing or is not what it should be; names the file.
    """
    tokenizer_path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{tokenizer_path} is not a usable tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer_config = _read_json(directory / "tokenizer_config.json", required=False)
    source = _template_source(directory, tokenizer_config)
    template = None
    if source is not None:
        template = ChatTemplate(source, _special_tokens(tokenizer_config))
    return ModelTokenizer(tokenizer, _read_facts(directory), template)


def _read_facts(directory: Path) -> ModelFacts:
    config = _read_json(directory / "config.json", required=True)
    generation = _read_json(directory / "generation_config.json", required=False)
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    eos_token_ids = (eos,) if isinstance(eos, int) else tuple(eos or ())
    sampling = {
        name: generation[name]
        for name in _SAMPLING_NAMES
        if isinstance(generation.get(name), int | float)
    }
    length = config.get("max_position_embeddings")
    return ModelFacts(
        directory=directory,
        max_model_len=length if isinstance(length, int) else _DEFAULT_CONTEXT_TOKENS,
        eos_token_ids=eos_token_ids,
        sampling_defaults=sampling,
    )


def _template_source(directory: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """The template from its own file, or from tokenizer_config.json (one, or several by name)."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name in _SPECIAL_TOKEN_NAMES:
        token = tokenizer_config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    if not required and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return content
