"""What a sampler on a device does with the logits of a few rows, step by step.

    rows -> log-probabilities -> penalties -> bias -> prohibitions -> argmax -> draw -> report

A step is arithmetic on the device, and small arrays made on the host that say which rows ask for it
and with what. So the arrays of all steps travel together, steps that no row asks for are left out,
and nothing waits. Indices count the rows of the part that a step is for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from services.worker.model.queues.base import Array
from services.worker.model.sampler import SamplingRow, is_greedy, uniform
from shared.sampling import SamplingParams


@dataclass(slots=True)
class Part:
    """Some rows on their way from logits to tokens."""

    logits: torch.Tensor  # [rows, vocab] float32, overwritten
    token_ids: torch.Tensor  # [rows] int64
    logprobs: torch.Tensor  # [reported, vocab]
    report: torch.Tensor  # [reported, 2 + 2 alternatives] float64, see `_report`

    @classmethod
    def of(cls, logits: torch.Tensor) -> Part:
        """Rows with nothing but logits `[rows, vocab]`."""
        nothing = logits.new_empty(0)
        return cls(logits, nothing, nothing, nothing)


@dataclass(frozen=True, slots=True)
class Step:
    """`run(part, *arrays)`, once the arrays are on the device."""

    run: Callable[..., None]
    arrays: tuple[Array, ...] = ()


def sampling_steps(
    rows: Sequence[SamplingRow], vocab_size: int, source_ids: torch.Tensor | None
) -> Iterator[Step]:
    """What leads to the tokens of `rows`.

    Args:
        source_ids: the tokens of the launch before `[rows]`; needed where a row has a `source_row`.
    """
    reported = _int64([i for i, row in enumerate(rows) if row.params.logprobs is not None])
    num_alternatives = max(row.params.logprobs or 0 for row in rows)
    if reported.size:
        yield Step(_keep_logprobs, (reported,))
    yield from _penalties(rows, source_ids)
    yield from _bias(rows)
    yield Step(_choose_likeliest)
    yield from _drawing(rows, vocab_size)
    if reported.size:
        yield Step(partial(_report, num_alternatives), (reported,))


def _choose_likeliest(part: Part) -> None:
    part.token_ids = part.logits.argmax(dim=-1)


# --- log-probabilities ---------------------------------------------------------------------------


def _keep_logprobs(part: Part, reported: torch.Tensor) -> None:
    """Those of the model, before logits are adjusted."""
    part.logprobs = torch.log_softmax(part.logits[reported], dim=-1)


def _report(num_alternatives: int, part: Part, reported: torch.Tensor) -> None:
    """Of each reported row: log-probability and rank of its token, the likeliest tokens, theirs."""
    chosen = part.logprobs.gather(1, part.token_ids[reported][:, None])
    rank = (part.logprobs > chosen).sum(dim=-1, keepdim=True) + 1
    top = torch.topk(part.logprobs, num_alternatives)
    columns = (chosen, rank, top.indices, top.values)
    part.report = torch.cat([column.double() for column in columns], dim=-1)


# --- logits are adjusted -------------------------------------------------------------------------


def _penalties(rows: Sequence[SamplingRow], source_ids: torch.Tensor | None) -> Iterator[Step]:
    """For the rows that ask for any; those are counted anew in all arrays but the first."""
    penalised = [index for index, row in enumerate(rows) if _is_penalised(row.params)]
    factors, prompts, outputs, unknown = [], [], [], []
    for index, row in enumerate(rows[position] for position in penalised):
        params = row.params
        factors.append(
            (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        )
        if params.repetition_penalty != 1.0:
            prompts += [(index, token_id) for token_id in set(row.prompt_token_ids)]
        outputs += [(index, *counted) for counted in Counter(row.output_token_ids).items()]
        if row.source_row is not None:
            unknown.append((index, row.source_row))
    if penalised:
        arrays = (
            _int64(penalised),
            np.array(factors, np.float32),
            _int64(prompts).reshape(-1, 2),
            _int64(outputs).reshape(-1, 3),
            _int64(unknown).reshape(-1, 2),
        )
        yield Step(partial(_penalise, source_ids if unknown else None), arrays)


def _is_penalised(params: SamplingParams) -> bool:
    additive = params.presence_penalty or params.frequency_penalty
    return params.repetition_penalty != 1.0 or bool(additive)


def _penalise(
    source_ids: torch.Tensor | None,  # [rows of the launch before]
    part: Part,
    penalised: torch.Tensor,  # [penalised]
    factors: torch.Tensor,  # [penalised, 3]: repetition, presence, frequency
    prompts: torch.Tensor,  # [prompt tokens, 2]: penalised row, token
    outputs: torch.Tensor,  # [output tokens, 3]: penalised row, token, how often
    unknown: torch.Tensor,  # [unknown tokens, 2]: penalised row, row of the launch before
) -> None:
    logits = part.logits[penalised]  # [penalised, vocab]
    counts = torch.zeros_like(logits)
    counts[outputs[:, 0], outputs[:, 1]] = outputs[:, 2].to(counts.dtype)
    if source_ids is not None:
        counts[unknown[:, 0], source_ids[unknown[:, 1]]] += 1.0
    is_output = counts > 0
    is_seen = is_output.clone()
    is_seen[prompts[:, 0], prompts[:, 1]] = True
    repetition, presence, frequency = factors[:, :, None].unbind(1)  # each [penalised, 1]
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(is_seen, scaled, logits)
    part.logits[penalised] = logits - torch.where(is_output, presence + frequency * counts, 0.0)


def _bias(rows: Sequence[SamplingRow]) -> Iterator[Step]:
    """What is added, and then what is forbidden."""
    biased = [(i, *pair) for i, row in enumerate(rows) for pair in row.params.logit_bias.items()]
    if biased:
        indices, token_ids, values = zip(*biased, strict=True)
        yield Step(_add, (_int64(indices), _int64(token_ids), np.array(values, np.float32)))
    forbidden = [(i, token) for i, row in enumerate(rows) for token in row.forbidden_token_ids]
    if forbidden:
        indices, token_ids = zip(*forbidden, strict=True)
        yield Step(_forbid, (_int64(indices), _int64(token_ids)))


def _add(
    part: Part,
    indices: torch.Tensor,  # [biased]
    token_ids: torch.Tensor,  # [biased]
    values: torch.Tensor,  # [biased]
) -> None:
    part.logits[indices, token_ids] += values


def _forbid(
    part: Part,
    indices: torch.Tensor,  # [forbidden]
    token_ids: torch.Tensor,  # [forbidden]
) -> None:
    part.logits[indices, token_ids] = -torch.inf


# --- tokens are drawn ----------------------------------------------------------------------------


def _drawing(rows: Sequence[SamplingRow], vocab_size: int) -> Iterator[Step]:
    """For the rows that are not greedy."""
    drawn = [index for index, row in enumerate(rows) if not is_greedy(row.params)]
    columns = []
    for row in (rows[index] for index in drawn):
        params = row.params
        num_kept = params.top_k if 0 < params.top_k < vocab_size else vocab_size
        noise = uniform(params.seed, row.position)
        columns.append((params.temperature, noise, params.min_p, params.top_p, num_kept - 1))
    if drawn:
        _, _, min_p, top_p, last_kept = zip(*columns, strict=True)
        has_order = min(last_kept) < vocab_size - 1 or min(top_p) < 1.0
        has_floor = has_order or max(min_p) > 0.0
        run = partial(_draw, has_order, has_floor)
        yield Step(run, (_int64(drawn), np.array(columns, np.float64)))


def _draw(
    has_order: bool,
    has_floor: bool,
    part: Part,
    drawn: torch.Tensor,  # [drawn]
    columns: torch.Tensor,  # [drawn, 5]: temperature, noise, min-p, top-p, last one kept by top-k
) -> None:
    """Sample by inverting the cumulative distributions.

    Args:
        has_order: what some row keeps depends on the order of its probabilities.
        has_floor: some row does not keep all.
    """
    temperature, noise, min_p, top_p, last_kept = columns[:, :, None].unbind(1)  # each [drawn, 1]
    probabilities = torch.softmax(part.logits[drawn] / temperature.float(), dim=-1)
    if has_floor:
        floor = min_p.float() * probabilities.amax(dim=-1, keepdim=True)
        if has_order:
            floor = _ordered_floor(probabilities, floor, top_p, last_kept.long())
        probabilities = torch.where(probabilities >= floor, probabilities, 0.0)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(noise * total, below_total)
    token_ids = torch.searchsorted(cumulative, target, right=True)
    # Logits that are not numbers still give a token.
    part.token_ids[drawn] = token_ids[:, 0].clamp(max=part.logits.shape[1] - 1)


def _ordered_floor(
    probabilities: torch.Tensor,  # [drawn, vocab]
    floor: torch.Tensor,  # [drawn, 1]: the least that min-p leaves
    top_p: torch.Tensor,  # [drawn, 1] float64
    last_kept: torch.Tensor,  # [drawn, 1] int64: by top-k, in descending order
) -> torch.Tensor:  # [drawn, 1]
    """The least probability that top-k, top-p and min-p leave."""
    descending = probabilities.sort(dim=-1, descending=True).values
    top_k_floor = descending.gather(1, last_kept)
    # As likely as the last one kept is kept too, here and below.
    candidates = torch.where(descending >= top_k_floor, descending, 0.0)
    floor = torch.maximum(floor, _nucleus_floor(candidates, top_p))
    is_limited = last_kept < probabilities.shape[1] - 1
    return torch.where(is_limited, torch.maximum(floor, top_k_floor), floor)


def _nucleus_floor(
    candidates: torch.Tensor,  # [drawn, vocab], descending
    top_p: torch.Tensor,  # [drawn, 1] float64
) -> torch.Tensor:  # [drawn, 1]
    """The least probability among the fewest candidates with `top_p` of their mass."""
    mass = candidates.cumsum(dim=-1, dtype=torch.float64)
    last = torch.searchsorted(mass, top_p * mass[:, -1:]).clamp(max=candidates.shape[1] - 1)
    return torch.where(top_p < 1.0, candidates.gather(1, last), 0.0)


def _int64(values: Sequence[Any]) -> Array:
    return np.array(values, np.int64)
