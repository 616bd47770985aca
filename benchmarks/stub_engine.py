"""An engine that costs nothing: what a stub worker answers, decided without clock or I/O.

The first item of a stream carries, as seven digit tokens, the microseconds that the stub held the
request; so a client can tell the time spent in the stub from the time spent in router and bus.
Every later item is one token, one per step, until `max_tokens`:

    index   0 ........ 6   7   8   9 ...
    text    "0000412"      "a" "b" "c" ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.messages import FinishReason, GenerateRequest, TokenItem

NUM_HOLD_DIGITS = 7


@dataclass(frozen=True, slots=True)
class StubVocabulary:
    """Token ids of the ten digits and of the tokens that later steps repeat in turn."""

    digits: tuple[int, ...]
    words: tuple[int, ...]

    def hold_tokens(self, hold_seconds: float) -> tuple[int, ...]:
        """The held time as `NUM_HOLD_DIGITS` tokens, saturating at ten seconds."""
        microseconds = min(round(hold_seconds * 1e6), 10**NUM_HOLD_DIGITS - 1)
        return tuple(self.digits[int(digit)] for digit in f"{microseconds:0{NUM_HOLD_DIGITS}d}")

    def word(self, index: int) -> int:
        """The token at output position `index`, behind the digits."""
        return self.words[(index - NUM_HOLD_DIGITS) % len(self.words)]


@dataclass(slots=True)
class _Stream:
    router_id: str
    attempt: int
    max_tokens: int
    hold_seconds: float
    num_tokens: int = NUM_HOLD_DIGITS


class StubEngine:
    """The running streams of one stub worker."""

    def __init__(self, vocabulary: StubVocabulary) -> None:
        self._vocabulary = vocabulary
        self._streams: dict[str, _Stream] = {}

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def start(self, request: GenerateRequest, hold_seconds: float) -> TokenItem:
        """Take a request in; returns its first item. A `max_tokens` under the digits ends it."""
        max_tokens = request.sampling.max_tokens
        stream = _Stream(request.router_id, request.attempt, max_tokens, hold_seconds)
        tokens = self._vocabulary.hold_tokens(hold_seconds)[:max_tokens]
        if max_tokens > NUM_HOLD_DIGITS:
            self._streams[request.request_id] = stream
        return self._item(request.request_id, stream, 0, tokens)

    def step(self) -> dict[str, list[TokenItem]]:
        """One token for each stream, by router. Streams that reach `max_tokens` end."""
        by_router: dict[str, list[TokenItem]] = {}
        for request_id, stream in list(self._streams.items()):
            index = stream.num_tokens
            stream.num_tokens += 1
            tokens = (self._vocabulary.word(index),)
            item = self._item(request_id, stream, index, tokens)
            by_router.setdefault(stream.router_id, []).append(item)
            if item.finish_reason is not None:
                del self._streams[request_id]
        return by_router

    def resume(self, request_id: str, num_received: int) -> TokenItem | None:
        """All tokens of a running stream from `num_received` on; None where it is unknown."""
        stream = self._streams.get(request_id)
        if stream is None:
            return None
        tokens = self._vocabulary.hold_tokens(stream.hold_seconds) + tuple(
            map(self._vocabulary.word, range(NUM_HOLD_DIGITS, stream.num_tokens))
        )
        return self._item(request_id, stream, num_received, tokens[num_received:])

    def router_of(self, request_id: str) -> str | None:
        """The router that a running stream goes to."""
        stream = self._streams.get(request_id)
        return stream.router_id if stream else None

    def cancel(self, request_id: str) -> None:
        """Forget a stream. Idempotent."""
        self._streams.pop(request_id, None)

    @staticmethod
    def _item(request_id: str, stream: _Stream, index: int, tokens: Sequence[int]) -> TokenItem:
        is_last = index + len(tokens) >= stream.max_tokens
        return TokenItem(
            request_id=request_id,
            attempt=stream.attempt,
            index=index,
            token_ids=tuple(tokens),
            finish_reason=FinishReason.LENGTH if is_last else None,
            queued_seconds=0.0 if index == 0 else None,
        )
