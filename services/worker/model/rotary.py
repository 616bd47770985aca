"""Rotary position embeddings as a table: cos and sin of every position, made once.

A table makes a row's values independent of the batch it is in (a vectorised cosine may round its
tail differently) and costs one gather per step. Frequencies are those of `transformers`, bit by
bit; its own functions are called for the scaled kinds.
"""

from __future__ import annotations

import torch

from services.worker.model.config import ModelConfig
from shared.errors import ConfigError


class RotaryTable:
    """cos and sin, each `[max_positions, head_dim]` float32, the two halves equal (rotate_half)."""

    def __init__(self, config: ModelConfig, max_positions: int) -> None:
        frequencies, scaling = _inverse_frequencies(config)  # [head_dim / 2]
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies[None, :]
        both_halves = torch.cat((angles, angles), dim=-1)
        self._cos = both_halves.cos() * scaling
        self._sin = both_halves.sin() * scaling

    @property
    def max_positions(self) -> int:
        return self._cos.shape[0]

    def rows(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, each `[num_tokens, head_dim]`, of `positions` `[num_tokens]`."""
        return self._cos[positions], self._sin[positions]


def _inverse_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    kind = config.rope_type
    if kind == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).to(torch.float32)
        return 1.0 / (config.rope_theta ** (exponents / config.head_dim)), 1.0
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind not in ROPE_INIT_FUNCTIONS or kind in ("dynamic", "longrope"):
        raise ConfigError(
            f"rope type {kind!r} of {config.architecture} is not supported: its frequencies change"
            " with the length of the prompt"
        )
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](
        AutoConfig.for_model(**config.raw), torch.device("cpu")
    )
    return frequencies, float(scaling)
