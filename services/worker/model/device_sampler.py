"""Choosing tokens on a GPU: all rows of the logits at once, one wait for the device at the end.

The rules and the noise are those of `sampler.py`: the same request draws the same tokens on both,
as far as the last bits of its logits agree. Passes that no row asks for are left out; which ones
is known on the host.

    logits [rows, vocab] -> penalties, bias (rows that ask) -> argmax
                         -> softmax(/ temperature) -> sort -> least probability kept, per row
                         -> cumulative distribution -> search for the row's noise
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.worker.model.sampler import (
    SampledToken,
    SamplingRow,
    adjust,
    is_greedy,
    report,
    uniform,
)
from shared.sampling import SamplingParams


def sample_on_device(
    logits: torch.Tensor,  # [rows, vocab] float32; may be overwritten
    rows: Sequence[SamplingRow],
) -> list[SampledToken]:
    """Draw one token per row; log-probabilities are those before penalties and temperature."""
    reported = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    logprobs = torch.log_softmax(logits[reported], dim=-1) if reported else None
    for row_logits, row in zip(logits, rows, strict=True):
        adjust(row_logits, row)
    drawn = [i for i, row in enumerate(rows) if not is_greedy(row.params)]
    tokens = logits.argmax(dim=-1)
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [rows[i] for i in drawn])
    token_ids: list[int] = tokens.tolist()
    sampled = [SampledToken(token_id) for token_id in token_ids]
    if logprobs is not None:
        for row_logprobs, i in zip(logprobs, reported, strict=True):
            num_alternatives = rows[i].params.logprobs or 0
            sampled[i] = SampledToken(
                token_ids[i], report(row_logprobs, token_ids[i], num_alternatives)
            )
    return sampled


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:  # [rows] int64
    """Sample by inverting the cumulative distributions of `logits` `[rows, vocab]`."""
    params = [row.params for row in rows]
    temperatures = _column([one.temperature for one in params], logits)
    probabilities = torch.softmax(logits / temperatures, dim=-1)
    if any(_has_floor(one, logits.shape[1]) for one in params):
        floor = _floor(probabilities, params)
        probabilities = torch.where(probabilities >= floor, probabilities, 0.0)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    noise = [uniform(row.params.seed, row.position) for row in rows]
    target = _column(noise, logits, torch.float64) * total
    below_total = torch.nextafter(total, torch.zeros_like(total))
    token_ids = torch.searchsorted(cumulative, torch.minimum(target, below_total), right=True)
    # Logits that are not numbers still give a token.
    return token_ids[:, 0].clamp(max=logits.shape[1] - 1)


def _has_floor(params: SamplingParams, vocab_size: int) -> bool:
    return _has_order(params, vocab_size) or params.min_p > 0.0


def _has_order(params: SamplingParams, vocab_size: int) -> bool:
    """True if what is kept depends on the order of the probabilities."""
    return 0 < params.top_k < vocab_size or params.top_p < 1.0


def _floor(
    probabilities: torch.Tensor,  # [rows, vocab]
    params: Sequence[SamplingParams],
) -> torch.Tensor:  # [rows, 1]
    """The least probability that top-k, top-p and min-p leave; 0 where they leave all."""
    vocab_size = probabilities.shape[1]
    highest = probabilities.amax(dim=-1, keepdim=True)
    floor = _column([one.min_p for one in params], probabilities) * highest
    if not any(_has_order(one, vocab_size) for one in params):
        return floor
    descending = probabilities.sort(dim=-1, descending=True).values
    kept = [one.top_k if 0 < one.top_k < vocab_size else vocab_size for one in params]
    last = _column([count - 1 for count in kept], probabilities, torch.int64)
    top_k_floor = descending.gather(1, last)
    # As likely as the last one kept is kept too, here and below.
    candidates = torch.where(descending >= top_k_floor, descending, 0.0)
    top_p = _column([one.top_p for one in params], probabilities, torch.float64)
    floor = torch.maximum(floor, _nucleus_floor(candidates, top_p))
    limits = _column([count < vocab_size for count in kept], probabilities, torch.bool)
    return torch.where(limits, torch.maximum(floor, top_k_floor), floor)


def _nucleus_floor(
    candidates: torch.Tensor,  # [rows, vocab], descending
    top_p: torch.Tensor,  # [rows, 1] float64
) -> torch.Tensor:  # [rows, 1]
    """The least probability among the fewest candidates with `top_p` of their mass."""
    mass = candidates.cumsum(dim=-1, dtype=torch.float64)
    last = torch.searchsorted(mass, top_p * mass[:, -1:]).clamp(max=candidates.shape[1] - 1)
    return torch.where(top_p < 1.0, candidates.gather(1, last), 0.0)


def _column(
    values: Sequence[float], like: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:  # [rows, 1]
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]
