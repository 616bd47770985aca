"""What the engine thread tells the event loop about groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from services.worker.engine.request import Request
from services.worker.identity import ModelFacts
from services.worker.pipeline.messages import RequestMessage
from services.worker.pipeline.peers import GroupKey, GroupPeers


@dataclass(frozen=True, slots=True)
class Committed:
    """The worker serves its layers of the group and nothing else."""

    key: GroupKey
    facts: ModelFacts


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A follower's requests, which its leader shall have, and the blocks it may book besides."""

    peers: GroupPeers
    requests: tuple[Request, ...]
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Adopted:
    """Requests that this worker, a leader, serves from now on."""

    requests: tuple[RequestMessage, ...]


@dataclass(frozen=True, slots=True)
class Settled:
    """No request is left on the layout before the group."""

    key: GroupKey
    facts: ModelFacts


@dataclass(frozen=True, slots=True)
class Restored:
    """The worker holds every layer again and still serves in its group."""

    key: GroupKey
    facts: ModelFacts


@dataclass(frozen=True, slots=True)
class Dissolved:
    """The worker serves alone; no request is left on the group's pipeline."""

    key: GroupKey


@dataclass(frozen=True, slots=True)
class PrepareFailed:
    """A link of a group that is only prepared is down, or a restore is not possible now."""

    key: GroupKey
    reason: str


class Phase(Enum):
    """A part of a change of the layout, as this worker sees it."""

    COMMIT = "commit"  # until the memory of given-up layers is usable KV
    FIRST_BATCH = "first_batch"  # from there until the first batch of a busy leader
    FIRST_TOKEN = "first_token"  # ... until what came of it
    EXCHANGE = "exchange"  # ... until no request is left on the layout before
    LOAD = "load"  # of missing layers, while the worker serves


@dataclass(frozen=True, slots=True)
class PhaseTimed:
    """A phase is over. `num_bytes`: weights given up, KV sent and received, weights loaded."""

    phase: Phase
    seconds: float
    num_bytes: int


GroupEvent = (
    Committed | HandedOver | Adopted | Settled | Restored | Dissolved | PrepareFailed | PhaseTimed
)

#: Takes events in the engine thread.
EventSink = Callable[[GroupEvent], None]
