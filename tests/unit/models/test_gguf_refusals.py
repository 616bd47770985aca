"""Whatever is wrong with a source is one clear `ModelSourceError`, and leaves nothing behind."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError
from shared.models import ModelSourceError, resolve_model, resolve_tokenizer
from tests.unit.models.tiny_gguf import MERGES, TOKENS, TinyGguf


def ignore_progress(done_bytes: int, total_bytes: int) -> None:
    pass


def refuse(path: Path, cache: Path) -> str:
    """The message with which `path` is refused; also checks that no cache entry is left."""
    with pytest.raises(ModelSourceError) as caught:
        resolve_model(str(path), cache, ignore_progress)
    message = str(caught.value)
    assert "\n" not in message
    assert [entry for entry in (cache / "models").glob("*") if entry.is_dir()] == []
    return message


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return TinyGguf().write(tmp_path_factory.mktemp("good") / "tiny.gguf").read_bytes()


def test_errors_are_configuration_errors() -> None:
    assert issubclass(ModelSourceError, ConfigError)


@pytest.mark.parametrize("share", [0.0, 0.00005, 0.001, 0.01, 0.03, 0.1, 0.5, 0.9, 0.9999])
def test_truncated_files(tmp_path: Path, good_file: bytes, share: float) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(good_file[: int(len(good_file) * share)])
    assert str(path) in refuse(path, tmp_path / "cache")


def test_last_byte_missing(tmp_path: Path, good_file: bytes) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(good_file.rstrip(b"\0")[:-64])
    assert "truncated" in refuse(path, tmp_path / "cache")


def test_wrong_magic(tmp_path: Path, good_file: bytes) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(b"PK\x03\x04" + good_file[4:])
    assert "not a GGUF file" in refuse(path, tmp_path / "cache")


def test_wrong_version(tmp_path: Path, good_file: bytes) -> None:
    path = tmp_path / "old.gguf"
    path.write_bytes(good_file[:4] + struct.pack("<I", 1) + good_file[8:])
    assert "version 1" in refuse(path, tmp_path / "cache")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_never_escape_as_other_errors(
    tmp_path: Path, good_file: bytes, data: st.DataObject
) -> None:
    header_bytes = good_file.index(b"token_embd.weight")
    damaged = bytearray(good_file)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, header_bytes + 2000))
        damaged[position] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        resolve_tokenizer(str(path), tmp_path / "cache")
        resolve_model(str(path), tmp_path / "cache", ignore_progress)
    except ModelSourceError as error:
        assert str(path) in str(error)  # noqa: PT017 - success is allowed too


@pytest.mark.parametrize(
    ("tiny", "expected"),
    [
        (TinyGguf(name="rwkv7"), "'rwkv7'"),
        (TinyGguf(pre="tekken"), "'tekken'"),
        (TinyGguf(without=("blk.1.ffn_up.weight",)), "blk.1.ffn_up.weight"),
        (TinyGguf(fields={"llama.rope.dimension_count": 8}), "rotary size 8"),
        (TinyGguf(fields={"llama.rope.scaling.type": "yarn"}), "'yarn'"),
        (TinyGguf(fields={"split.count": 3}), "3 parts"),
        (TinyGguf(fields={"general.alignment": 24}), "alignment"),
        (
            TinyGguf(tensors={"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)}),
            "blk.0.ffn_gate_inp.weight",
        ),
        (TinyGguf(merges=(*MERGES, "x yz")), "'x yz'"),
        (TinyGguf(tokens=(*TOKENS[:-1], TOKENS[5])), "twice"),
        (TinyGguf(tokens=(*TOKENS, "more")), "embedding"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_models_are_refused_by_name(
    tmp_path: Path, tiny: TinyGguf, expected: str
) -> None:
    path = tiny.write(tmp_path / "tiny.gguf")
    assert expected in refuse(path, tmp_path / "cache")


def test_unsupported_quantisation(tmp_path: Path, good_file: bytes) -> None:
    name = b"token_embd.weight"
    at = good_file.index(name) + len(name) + 4 + 2 * 8  # rank, two dimensions, then the type
    damaged = good_file[:at] + struct.pack("<I", 19) + good_file[at + 4 :]
    path = tmp_path / "iq1.gguf"
    path.write_bytes(damaged)
    message = refuse(path, tmp_path / "cache")
    assert "token_embd.weight" in message
    assert "type 19" in message


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    tiny = TinyGguf(
        without=("output_norm.weight",),
        tensors={"output_norm.weight": np.full(64, np.nan, np.float32)},
    )
    path = tiny.write(tmp_path / "nan.gguf")
    assert "output_norm.weight" in refuse(path, tmp_path / "cache")


def test_missing_file_and_wrong_kind_of_file(tmp_path: Path) -> None:
    assert "no model at" in refuse(tmp_path / "nothing.gguf", tmp_path / "cache")
    assert "no model at" in refuse(Path("~nobody-of-this-name/x.gguf"), tmp_path / "cache")
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "neither a directory nor" in refuse(tmp_path / "model.bin", tmp_path / "cache")


def test_unknown_builtin(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="builtin:smollm2"):
        resolve_model("builtin:gpt5", tmp_path, ignore_progress)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "no config.json"),
        ({"config.json": "{oops"}, "not valid JSON"),
        ({"config.json": "[]"}, "JSON object"),
        ({"config.json": "{}"}, "neither model.safetensors nor"),
        ({"config.json": "{}", "model.safetensors.index.json": "{}"}, "weight_map"),
        (
            {
                "config.json": "{}",
                "model.safetensors.index.json": '{"weight_map": {"a": "part-1.safetensors"}}',
            },
            "part-1.safetensors",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_incomplete_directories(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert expected in refuse(tmp_path, tmp_path / "cache")


def test_a_complete_directory_is_used_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_model(str(tmp_path), tmp_path / "cache", ignore_progress) == tmp_path


def test_a_directory_without_tokenizer_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelSourceError, match=r"no tokenizer\.json"):
        resolve_tokenizer(str(tmp_path), tmp_path / "cache")
