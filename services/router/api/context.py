"""What the handlers share: one immutable object, made by `service.py`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from services.router.errors import NotFoundError
from services.router.fleet import Fleet
from services.router.generator import Generator
from services.router.metrics import RouterMetrics
from services.router.tokenizer import ModelTokenizer
from shared.bus.base import Bus
from shared.subjects import Subjects


class DrainState:
    """Whether this router takes new requests."""

    def __init__(self) -> None:
        self.is_draining = False


@dataclass(frozen=True)
class ServedModel:
    """The model as the API names and limits it; `source` is what `--model` said."""

    name: str
    root: str
    source: str
    max_model_len: int
    sampling_defaults: dict[str, float]
    created: int = field(default_factory=lambda: int(time.time()))

    def check(self, asked: str | None) -> None:
        """Raise NotFoundError where a request names another model; no name means this one."""
        if asked not in (None, self.name, self.root, self.source):
            raise NotFoundError(
                f"the model {asked!r} does not exist; this server has {self.name!r}", param="model"
            )


@dataclass(frozen=True)
class ApiContext:
    """Everything a handler may use."""

    model: ServedModel
    tokenizer: ModelTokenizer
    fleet: Fleet
    generator: Generator
    metrics: RouterMetrics
    bus: Bus
    subjects: Subjects
    drain: DrainState
    max_batch_prompts: int

    def longest_request(self) -> int:
        """Prompt and output tokens that fit the model and the largest KV cache there is now."""
        pool = self.fleet.longest_request(time.monotonic())
        length = self.model.max_model_len
        return length if pool is None else min(length, pool)
