"""Builds `tokenizer.json` and `tokenizer_config.json` from the vocabulary inside a GGUF file.

The result must give the ids the model was trained with, so the way text is split before merging
is taken from `tokenizer.ggml.pre`, and a way that is not known exactly is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from shared.models.errors import ModelSourceError
from shared.models.gguf_file import GgufFile

_CONTROL_TOKEN, _USER_DEFINED_TOKEN = 3, 4

# Published in the tokenizer.json of Llama 3 and Qwen2; they differ in how digits are grouped.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_PATTERN = _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2_PATTERN = _WORDS + r"\p{N}" + _REST


@dataclass(frozen=True)
class _Splitting:
    """One value of `tokenizer.ggml.pre`: how text is cut into the pieces that are then merged."""

    pre_tokenizer: Callable[[], pre_tokenizers.PreTokenizer]
    normalizer: Callable[[], normalizers.Normalizer] | None = None
    ignore_merges: bool = False
    adds_bos: bool = False


def _split_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _split_words()])


def _split_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split_by(pattern: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def build() -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return build


_SPLITTINGS = {
    "smollm": _Splitting(_split_digits),
    "gpt-2": _Splitting(_split_words),
    "llama-bpe": _Splitting(_split_by(_LLAMA3_PATTERN), ignore_merges=True, adds_bos=True),
    "qwen2": _Splitting(_split_by(_QWEN2_PATTERN), normalizers.NFC),
}


def write_tokenizer(file: GgufFile, directory: Path) -> None:
    """Writes both tokenizer files into `directory`. Raises `ModelSourceError`."""
    splitting = _splitting(file)
    tokens = file.required_list("tokenizer.ggml.tokens", str)
    tokenizer = _build(file, splitting, tokens)
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.required(f"{_architecture(file)}.context_length", int),
    }
    for role, field in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token_id = special_token_id(file, field)
        if token_id is not None:
            config[f"{role}_token"] = tokens[token_id]
    template = file.optional("tokenizer.chat_template", str, "")
    if template:
        config["chat_template"] = template
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def generation_config(file: GgufFile) -> dict[str, object]:
    """The content of `generation_config.json`: which ids start, end and pad a text."""
    config: dict[str, object] = {}
    for role, field in (("bos", "bos"), ("pad", "padding")):
        token_id = special_token_id(file, field)
        if token_id is not None:
            config[f"{role}_token_id"] = token_id
    found = [special_token_id(file, field) for field in ("eos", "eot")]
    ends = list(dict.fromkeys(end for end in found if end is not None))
    if not ends:
        raise ModelSourceError(
            f"{file.path} names no end-of-text token (tokenizer.ggml.eos_token_id); use a file"
            " that does, or no answer would ever end"
        )
    config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return config


def special_token_id(file: GgufFile, role: str) -> int | None:
    """The id of `tokenizer.ggml.<role>_token_id`, checked against the vocabulary."""
    key = f"tokenizer.ggml.{role}_token_id"
    if key not in file.metadata:
        return None
    token_id = file.required(key, int)
    if not 0 <= token_id < len(file.required_list("tokenizer.ggml.tokens", str)):
        raise ModelSourceError(f"{file.path}: {key} is {token_id}, which is not in the vocabulary")
    return token_id


def _splitting(file: GgufFile) -> _Splitting:
    model = file.required("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise ModelSourceError(
            f"{file.path} has a tokenizer of type {model!r}; only byte-level BPE ('gpt2') is read"
            " from GGUF, so use the safetensors form of the model"
        )
    name = file.optional("tokenizer.ggml.pre", str, "default")
    splitting = _SPLITTINGS.get(name)
    if splitting is None:
        raise ModelSourceError(
            f"{file.path} splits text the way {name!r} (tokenizer.ggml.pre), which is not"
            f" supported; supported are {', '.join(_SPLITTINGS)}"
        )
    return splitting


def _build(file: GgufFile, splitting: _Splitting, tokens: list[str]) -> Tokenizer:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelSourceError(f"{file.path} is corrupt: a token is in its vocabulary twice")
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges(file, vocabulary),
        ignore_merges=splitting.ignore_merges,
    )
    tokenizer = Tokenizer(model)
    if splitting.normalizer is not None:
        tokenizer.normalizer = splitting.normalizer()
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(file, splitting, tokens)
    types = file.required_list("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise ModelSourceError(
            f"{file.path} is corrupt: {len(tokens)} tokens but {len(types)} token types"
        )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL_TOKEN, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL_TOKEN, _USER_DEFINED_TOKEN)
        ]
    )
    return tokenizer


def _merges(file: GgufFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for merge in file.required_list("tokenizer.ggml.merges", str):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise ModelSourceError(
                f"{file.path} is corrupt: the merge {merge!r} is not made of its tokens"
            )
        merges.append((left, right))
    return merges


def _post_processor(
    file: GgufFile, splitting: _Splitting, tokens: list[str]
) -> processors.PostProcessor:
    adds_bos = file.optional("tokenizer.ggml.add_bos_token", bool, splitting.adds_bos)
    adds_eos = file.optional("tokenizer.ggml.add_eos_token", bool, False)
    bos, eos = special_token_id(file, "bos"), special_token_id(file, "eos")
    before = [tokens[bos]] if adds_bos and bos is not None else []
    after = [tokens[eos]] if adds_eos and eos is not None else []
    byte_level = processors.ByteLevel(trim_offsets=False)
    if not before and not after:
        return byte_level
    known = {tokens[token_id]: token_id for token_id in (bos, eos) if token_id is not None}
    template = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1"]
        + [f"{token}:1" for token in after],
        special_tokens=list(known.items()),
    )
    return processors.Sequence([byte_level, template])


def _architecture(file: GgufFile) -> str:
    return file.required("general.architecture", str)
