"""Token items to text: detokenising, stop strings, and what a client is shown of them.

One `OutputProcessor` per request; pure, called for every item of its stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.router.stop_strings import StopStringScanner
from services.router.tokenizer import ModelTokenizer
from shared.messages import FinishReason, TokenItem, TokenLogprobs


@dataclass(slots=True)
class Delta:
    """What one engine step adds to an output."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """How a request wants its output."""

    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True


class OutputProcessor:
    """The text of one request."""

    def __init__(self, tokenizer: ModelTokenizer, options: OutputOptions) -> None:
        self._decoder = tokenizer.new_decoder(skip_special_tokens=options.skip_special_tokens)
        self._options = options
        self._scanner = (
            StopStringScanner(options.stop, include_in_output=options.include_stop_str_in_output)
            if options.stop
            else None
        )
        self.num_tokens = 0

    def push(self, item: TokenItem) -> Delta:
        """Take the next item. After a delta with a finish reason the output is complete."""
        shown = self._shown(item)
        if self._scanner is None:
            self.num_tokens += len(item.token_ids)
            text = "".join(map(self._decoder.push, shown))
        else:
            text, matched, num_used = self._scan(self._scanner, shown)
            if matched is not None:
                return self._stopped(item, text, matched, num_used)
            self.num_tokens += len(item.token_ids) - num_used
        if item.finish_reason is not None:
            text += self._decoder.finish() if self._scanner is None else self._rest(self._scanner)
        return Delta(
            text, item.token_ids, item.logprobs or (), item.finish_reason, self._stop_reason(item)
        )

    def _shown(self, item: TokenItem) -> Sequence[int]:
        """The item's tokens without the one that ended the output, which is no text."""
        if item.finish_reason is FinishReason.STOP and not self._options.include_stop_str_in_output:
            return item.token_ids[:-1]
        return item.token_ids

    def _scan(
        self, scanner: StopStringScanner, token_ids: Sequence[int]
    ) -> tuple[str, str | None, int]:
        """Text, stop string that ended it, and the number of tokens up to there."""
        text = ""
        for number, token_id in enumerate(token_ids, start=1):
            self.num_tokens += 1
            piece = self._decoder.push(token_id)
            if self.num_tokens <= self._options.min_tokens:
                text += scanner.pass_through(piece)
                continue
            scan = scanner.push(piece)
            text += scan.text
            if scan.matched is not None:
                return text, scan.matched, number
        return text, None, len(token_ids)

    def _rest(self, scanner: StopStringScanner) -> str:
        return scanner.pass_through(self._decoder.finish())

    @staticmethod
    def _stopped(item: TokenItem, text: str, matched: str, num_used: int) -> Delta:
        return Delta(
            text,
            item.token_ids[:num_used],
            (item.logprobs or ())[:num_used],
            FinishReason.STOP,
            matched,
        )

    def _stop_reason(self, item: TokenItem) -> int | None:
        """The stop token a client asked for; the model's own end of sequence is no reason."""
        if item.stop_token_id in self._options.stop_token_ids:
            return item.stop_token_id
        return None


def merge_deltas(deltas: Sequence[Delta]) -> Delta:
    """Several deltas as one; `deltas` is not empty and only the last may be final."""
    last = deltas[-1]
    return Delta(
        "".join(delta.text for delta in deltas),
        [token_id for delta in deltas for token_id in delta.token_ids],
        [logprobs for delta in deltas for logprobs in delta.logprobs],
        last.finish_reason,
        last.stop_reason,
    )
