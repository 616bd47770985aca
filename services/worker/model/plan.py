"""Which arenas a span of the model needs and how large they are; takes no memory itself.

    span [0, L)     embedding | layer.0 | layer.1 | ... | layer.L-1 | head
    span [a, b)                 layer.a | ... | layer.b-1

Where input and output matrix are tied, the embedding's arena holds both and the final norm, there
is no head's arena, and the last span needs the embedding's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from services.worker.kernels.base import Kernels
from services.worker.memory.sizing import check_budget, chunks_for
from services.worker.model.arena import ArenaLayout, PartSpec
from services.worker.model.checkpoint import EMBEDDING, FINAL_NORM, LM_HEAD
from services.worker.model.config import ModelConfig
from services.worker.model.layers.base import DecoderLayers
from shared.layout import Span

EMBEDDING_ARENA = "embedding"
HEAD_ARENA = "head"
#: The least KV cache worth starting with: one request of this many tokens.
_MIN_KV_TOKENS = 512


@dataclass(frozen=True, slots=True)
class ArenaPlan:
    """One arena: a decoder layer, the embedding or the head."""

    name: str
    layout: ArenaLayout
    prefix: str  # what stands before the layout's sources in the checkpoint
    layer: int | None = None


class PartBytes(NamedTuple):
    """Memory of one decoder layer, of the ends, and of a whole model, which may share its ends."""

    layer: int
    embedding: int
    head: int
    whole: int


class ModelPlan:
    """Arenas of one model. Parts of the outer arenas are called by their checkpoint names."""

    def __init__(self, config: ModelConfig, layers: DecoderLayers[Any], kernels: Kernels) -> None:
        self.config = config
        self.layers = layers
        self.block_size = kernels.block_size
        self.dtype = kernels.dtype
        shape = (config.vocab_size, config.hidden_size)
        norm = PartSpec(FINAL_NORM, (config.hidden_size,), (FINAL_NORM,))
        head = PartSpec(LM_HEAD, shape, (LM_HEAD,))
        embedding = [PartSpec(EMBEDDING, shape, (EMBEDDING,))]
        if config.tie_word_embeddings:
            embedding.append(norm)
        self._embedding = ArenaPlan(EMBEDDING_ARENA, ArenaLayout(embedding, kernels), "")
        self._head = ArenaPlan(HEAD_ARENA, ArenaLayout([norm, head], kernels), "")

    def arenas(self, span: Span) -> list[ArenaPlan]:
        """The arenas that running `span` needs, in the order they are loaded."""
        is_last = span.end == self.config.num_layers
        arenas = [self._layer(layer) for layer in range(span.start, span.end)]
        if span.start == 0 or (is_last and self.config.tie_word_embeddings):
            arenas.append(self._embedding)
        if is_last and not self.config.tie_word_embeddings:
            arenas.append(self._head)
        return arenas

    def _layer(self, layer: int) -> ArenaPlan:
        return ArenaPlan(f"layer.{layer}", self.layers.layout, f"model.layers.{layer}.", layer)

    @property
    def embedding(self) -> ArenaPlan:
        """The arena with the embedding matrix."""
        return self._embedding

    @property
    def head(self) -> ArenaPlan:
        """The arena with the final norm and the output matrix."""
        return self._embedding if self.config.tie_word_embeddings else self._head

    @property
    def head_matrix(self) -> str:
        """The part of `head` that is the output matrix."""
        return EMBEDDING if self.config.tie_word_embeddings else LM_HEAD

    def check_budget(
        self, span: Span, budget_bytes: int, chunk_bytes: int, max_model_len: int | None
    ) -> None:
        """Refuse a budget that cannot serve anything, before anything is loaded.

        Raises:
            DeviceMemoryTooSmallError: says how much is needed.
        """
        longest = min(max_model_len or _MIN_KV_TOKENS, self.config.max_model_len)
        check_budget(
            budget_bytes,
            [arena.layout.nbytes for arena in self.arenas(span)],
            [self.kv_block_bytes] * len(span),
            -(-min(_MIN_KV_TOKENS, longest) // self.block_size),
            chunk_bytes,
        )

    def part_bytes(self, chunk_bytes: int) -> PartBytes:
        """What the parts take in whole chunks of `chunk_bytes`."""

        def mapped(*arenas: ArenaPlan) -> int:
            return chunk_bytes * sum(chunks_for(a.layout.nbytes, chunk_bytes) for a in arenas)

        whole = self.arenas(Span(start=0, end=self.config.num_layers))
        return PartBytes(
            mapped(whole[0]), mapped(self.embedding), mapped(self.head), mapped(*whole)
        )

    @property
    def kv_block_shape(self) -> tuple[int, int, int, int]:
        """One block of one layer: `[2, block_size, num_kv_heads, head_dim]` of `dtype`."""
        return 2, self.block_size, self.config.num_kv_heads, self.config.head_dim

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one block of one layer."""
        two, block_size, num_kv_heads, head_dim = self.kv_block_shape
        return self.dtype.itemsize * two * block_size * num_kv_heads * head_dim
