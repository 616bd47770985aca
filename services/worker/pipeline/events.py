"""What the engine thread tells the event loop about groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


GroupEvent = Committed | HandedOver | Adopted | Settled | Restored | Dissolved | PrepareFailed

#: Takes events in the engine thread.
EventSink = Callable[[GroupEvent], None]
