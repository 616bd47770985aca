"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.router.api.output import Delta
from services.router.tokenizer import ModelTokenizer


def _token_text(tokenizer: ModelTokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode(errors="replace")


def chat_logprobs(tokenizer: ModelTokenizer, delta: Delta) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}]}`, one entry per token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    content = [
        entry(token_id, found.logprob)
        | {
            "top_logprobs": [
                entry(top_id, top)
                for top_id, top in zip(found.top_token_ids, found.top_logprobs, strict=True)
            ]
        }
        for token_id, found in zip(delta.token_ids, delta.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """`{tokens, token_logprobs, top_logprobs, text_offset}`; the offsets run over the output."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def of(self, delta: Delta) -> dict[str, Any]:
        """The object for one delta; deltas in order."""
        tokens = [_token_text(self._tokenizer, token_id) for token_id in delta.token_ids]
        return {
            "tokens": tokens,
            "token_logprobs": [found.logprob for found in delta.logprobs],
            "top_logprobs": [
                self._alternatives(found.top_token_ids, found.top_logprobs)
                for found in delta.logprobs
            ],
            "text_offset": self._offsets(tokens),
        }

    def _alternatives(
        self, token_ids: Sequence[int], logprobs: Sequence[float]
    ) -> dict[str, float]:
        return {
            _token_text(self._tokenizer, token_id): logprob
            for token_id, logprob in zip(token_ids, logprobs, strict=True)
        }

    def _offsets(self, tokens: Sequence[str]) -> list[int]:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return offsets
