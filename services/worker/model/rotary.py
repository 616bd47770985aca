"""Rotary position embeddings as a table: cos and sin of each position, computed once.

A table makes a row's values independent of the batch it is in (a vectorised cosine may round its
tail differently) and costs one gather per step. It grows in pages as positions occur, so a model
made for very long prompts takes no memory for those that never come. Frequencies are those of
`transformers`, bit by bit; its own functions are called for the scaled kinds.
"""

from __future__ import annotations

import torch

from services.worker.model.config import ModelConfig
from services.worker.model.transformers_config import transformers_config
from shared.errors import ConfigError

_PAGE_POSITIONS = 2048
_CPU = torch.device("cpu")

#: Kinds whose frequencies change with the length of the prompt.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


class RotaryTable:
    """cos and sin, each `[positions, head_dim]` float32, the two halves equal (rotate_half)."""

    def __init__(self, config: ModelConfig, device: torch.device = _CPU) -> None:
        """Raises ConfigError for a kind of rotary embedding that is not served."""
        self._frequencies, self._scaling = _inverse_frequencies(config)  # [head_dim / 2]
        self._cos = self._sin = torch.empty(0, config.head_dim, device=device)

    def rows(
        self,
        positions: torch.Tensor,  # [num_tokens] int64, all below `end`
        end: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, each `[num_tokens, head_dim]`, of `positions`."""
        while self._cos.shape[0] < end:
            self._add_page()
        return self._cos[positions], self._sin[positions]

    def _add_page(self) -> None:
        start = self._cos.shape[0]
        positions = torch.arange(start, start + _PAGE_POSITIONS, dtype=torch.float32)
        angles = positions[:, None] * self._frequencies[None, :]  # [page, head_dim / 2]
        both_halves = torch.cat((angles, angles), dim=-1)
        self._cos = torch.cat((self._cos, (both_halves.cos() * self._scaling).to(self._cos.device)))
        self._sin = torch.cat((self._sin, (both_halves.sin() * self._scaling).to(self._sin.device)))


def _inverse_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    kind = config.rope_type
    if kind == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).to(torch.float32)
        return 1.0 / (config.rope_theta ** (exponents / config.head_dim)), 1.0
    if kind in _LENGTH_DEPENDENT:
        raise ConfigError(
            f"rope type {kind!r} of {config.architecture} is not supported: its frequencies change"
            " with the length of the prompt"
        )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind not in ROPE_INIT_FUNCTIONS:
        raise ConfigError(
            f"rope type {kind!r} of {config.architecture} is not supported; supported are default,"
            f" {', '.join(sorted(set(ROPE_INIT_FUNCTIONS) - set(_LENGTH_DEPENDENT)))}"
        )
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](
        transformers_config(config.raw, config.architecture), torch.device("cpu")
    )
    return frequencies, float(scaling)
