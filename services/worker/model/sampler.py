"""Choosing tokens: one vectorised pass over the logits of the rows that need a token.

    logits [rows, vocab]
      -> forbidden tokens, penalties, bias        only the rows that ask for them
      -> greedy rows: argmax
      -> other rows: / temperature -> top-k, top-p, min-p -> inverse of the cumulative distribution

The noise of a row is one uniform number made from (seed, position) by a counter-based hash and
nothing else, so a request draws the same tokens alone or in a batch, after a preemption, on another
worker. All arithmetic is per row; no row sees its neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.messages import TokenLogprobs
from shared.sampling import SamplingParams

#: Sorting a whole vocabulary is slow; nearly every nucleus lies within so many top tokens.
_NUCLEUS_CANDIDATES = 1024

#: Below this temperature a row is greedy (vLLM's bound): dividing by less would overflow.
_GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the sampler needs to know of one request."""

    params: SamplingParams
    position: int  # index of the token to draw in the whole sequence (prompt included)
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    forbidden_token_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One drawn token, with its log-probabilities where the request asked for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position): two rounds of the splitmix64 finaliser."""
    state = (_mix(seed & _MASK) + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    return (_mix(state) >> 11) * 2.0**-53


_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample(
    logits: torch.Tensor,  # [rows, vocab] float32; may be overwritten
    rows: Sequence[SamplingRow],
) -> list[SampledToken]:
    """Draw one token per row.

    Log-probabilities are those of the model, before penalties and temperature (as in vLLM).
    """
    raw_logprobs = _raw_logprobs(logits, rows)
    for index, row in enumerate(rows):
        _adjust(logits[index], row)
    token_ids = logits.argmax(dim=-1)  # [rows]
    random_rows = [
        index for index, row in enumerate(rows) if row.params.temperature >= _GREEDY_TEMPERATURE
    ]
    if random_rows:
        token_ids[random_rows] = _draw(logits[random_rows], [rows[i] for i in random_rows])
    return [
        SampledToken(token_id, _report(raw_logprobs.get(index), token_id, row.params.logprobs))
        for index, (row, token_id) in enumerate(zip(rows, token_ids.tolist(), strict=True))
    ]


def _raw_logprobs(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> dict[int, torch.Tensor]:
    """Log-probabilities of the rows that report them, by row index."""
    return {
        index: torch.log_softmax(logits[index], dim=-1)
        for index, row in enumerate(rows)
        if row.params.logprobs is not None
    }


def _adjust(logits: torch.Tensor, row: SamplingRow) -> None:
    """Apply penalties, bias and prohibitions to one row `[vocab]` in place."""
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor([*{*row.prompt_token_ids, *row.output_token_ids}], dtype=torch.int64)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.presence_penalty or params.frequency_penalty) and row.output_token_ids:
        counts = Counter(row.output_token_ids)
        frequencies = torch.tensor(list(counts.values()))
        penalties = params.presence_penalty + params.frequency_penalty * frequencies
        logits[torch.tensor(list(counts))] -= penalties
    if params.logit_bias:
        biased = torch.tensor(list(params.logit_bias))
        logits[biased] += torch.tensor(list(params.logit_bias.values()))
    if row.forbidden_token_ids:
        logits[torch.tensor(row.forbidden_token_ids)] = -torch.inf


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Sample each row of `[rows, vocab]` by inverting its cumulative distribution."""
    temperatures = torch.tensor([row.params.temperature for row in rows])
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures[:, None]
    for index, row in enumerate(rows):
        _truncate(scaled[index], row.params)
    cumulative = torch.softmax(scaled, dim=-1).to(torch.float64).cumsum(dim=-1)
    noise = torch.tensor(
        [uniform(row.params.seed, row.position) for row in rows], dtype=torch.float64
    )
    # The first token whose cumulative mass exceeds the noise has positive probability itself;
    # scaling by the last sum keeps the search inside the vocabulary.
    targets = noise[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1)


def _truncate(scaled: torch.Tensor, params: SamplingParams) -> None:
    """Remove the tokens that top-k, top-p and min-p exclude from one row `[vocab]` in place.

    `scaled` is relative to the row's largest logit, which is 0 here. Tokens as likely as the last
    one kept are kept too.
    """
    if params.top_k and params.top_k < scaled.numel():
        threshold = torch.topk(scaled, params.top_k).values[-1]
        scaled.masked_fill_(scaled < threshold, -torch.inf)
    if params.top_p < 1.0:
        scaled.masked_fill_(scaled < _nucleus_threshold(scaled, params.top_p), -torch.inf)
    if params.min_p > 0.0:
        scaled.masked_fill_(scaled.exp() < params.min_p, -torch.inf)


def _nucleus_threshold(scaled: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest value inside the nucleus: the fewest top tokens whose mass reaches `top_p`."""
    log_total = torch.logsumexp(scaled, dim=-1)
    for count in (min(_NUCLEUS_CANDIDATES, scaled.numel()), scaled.numel()):
        top = torch.topk(scaled, count).values
        mass_before = (top - log_total).exp().cumsum(dim=-1).roll(1)
        mass_before[0] = 0.0
        inside = int((mass_before < top_p).sum())
        if inside < count:
            break
    return top[inside - 1]


def _report(
    logprobs: torch.Tensor | None,  # [vocab]
    token_id: int,
    num_alternatives: int | None,
) -> TokenLogprobs | None:
    if logprobs is None or num_alternatives is None:
        return None
    chosen = logprobs[token_id]
    top = torch.topk(logprobs, num_alternatives) if num_alternatives else None
    return TokenLogprobs(
        logprob=float(chosen),
        rank=int((logprobs > chosen).sum()) + 1,
        top_token_ids=tuple(top.indices.tolist()) if top else (),
        top_logprobs=tuple(top.values.tolist()) if top else (),
    )
