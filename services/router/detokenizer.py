"""Token ids to text while they arrive: whole characters only, and exactly the text of all ids.

The concatenation of everything a decoder returns, `finish()` included, equals
`Tokenizer.decode(all ids)`. Called by `api/output.py` for every generated token.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer


class TextDecoder(Protocol):
    """Decodes one request's output."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character is incomplete."""
        ...

    def finish(self) -> str:
        """The rest, with U+FFFD for what never became a character. Call once."""
        ...


def byte_alphabet() -> dict[str, int]:
    """The characters byte-level BPE writes its 256 bytes as (GPT-2's `bytes_to_unicode`, inverted).

    Printable Latin-1 stands for itself; the other bytes got the characters from U+0100 on.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = (byte for byte in range(256) if byte not in plain)
    alphabet = {chr(byte): byte for byte in plain}
    alphabet.update({chr(0x100 + number): byte for number, byte in enumerate(shifted)})
    return alphabet


def byte_level_table(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every token of a byte-level tokenizer, by id; ids in no vocabulary are empty."""
    alphabet = byte_alphabet()
    table = [b""] * (max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1)
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if all(letter in alphabet for letter in token):
            table[token_id] = bytes(alphabet[letter] for letter in token)
        else:
            table[token_id] = token.encode()
    return table


class ByteLevelDecoder:
    """For byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM): a table look-up and a UTF-8 decoder.

    Every token is a fixed string of bytes there, so decoding is concatenation, and O(1) per token.
    """

    def __init__(self, table: Sequence[bytes], skipped: frozenset[int]) -> None:
        """`skipped` are the ids without text: the special tokens, or none."""
        self._table = table
        self._skipped = skipped
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        if token_id in self._skipped or token_id >= len(self._table):
            return ""
        return self._decode(self._table[token_id])

    def finish(self) -> str:
        return self._decode(b"", True)


class WindowDecoder:
    """For every other decoder (SentencePiece, byte fallback): decode a short window twice.

    A token's text depends on its neighbours there. The window begins where text was complete last,
    so its cost does not grow with the output:

        ids    ... [prefix ......... read ......... end)
        text       decode(prefix:read) is out; what decode(prefix:end) adds is new
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._num_read = 0
        self._read_text = ""

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith("\ufffd") or len(text) <= len(self._read_text):
            return ""
        new_text = text[len(self._read_text) :]
        del self._window[: self._num_read]
        self._num_read = len(self._window)
        self._read_text = self._decode(self._window)
        return new_text

    def finish(self) -> str:
        return self._decode(self._window)[len(self._read_text) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=self._skip_special_tokens
        )
        return text
