"""What the engine thread tells the event loop about groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from services.worker.engine.request import Request
from services.worker.pipeline.messages import RequestMessage
from services.worker.pipeline.peers import GroupKey, GroupPeers


@dataclass(frozen=True, slots=True)
class Prepared:
    """The layout that was read at `epoch` may be committed: its links and layers are here."""

    epoch: int


@dataclass(frozen=True, slots=True)
class PrepareFailed:
    """The layout that was read at `epoch` cannot be: a link is down, or there is no room."""

    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Committed:
    """The worker serves in the layout that was read at `epoch`."""

    epoch: int


@dataclass(frozen=True, slots=True)
class HandedOver:
    """Requests that `heir`, a member of the group, shall have, and the blocks it may book here."""

    peers: GroupPeers
    heir: str
    requests: tuple[Request, ...]
    num_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Adopted:
    """Requests that this worker, a leader, serves from now on."""

    requests: tuple[RequestMessage, ...]


@dataclass(frozen=True, slots=True)
class Settled:
    """Nothing is left on the layouts before the one that was read at `epoch`."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Broken:
    """A member of the group is gone, or the plan has ended it: the worker loads what it lacks.

    Its requests are lost, and so are those that moved within any of the groups `keys`.
    """

    keys: tuple[GroupKey, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Whole:
    """After `Broken`: every layer is here, and the worker serves alone."""


@dataclass(frozen=True, slots=True)
class FormerLost:
    """A member of a group of before is gone; the layout of now is not hit."""

    key: GroupKey


class Phase(Enum):
    """A part of a change of the layout, as this worker sees it."""

    COMMIT = "commit"  # until the memory of given-up layers is usable KV
    HAND_OVER = "hand_over"  # from the leader's commit until all members have committed
    FIRST_BATCH = "first_batch"  # from there until a leader with requests has made a batch
    FIRST_TOKEN = "first_token"  # from there until that has passed the pipeline
    EXCHANGE = "exchange"  # from the first order until no request is left on the layout before
    LOAD = "load"  # of missing layers, while the worker serves
    LOAD_CHECKPOINT = "load_checkpoint"  # the part of it that came from the own checkpoint
    LOAD_PEER = "load_peer"  # the part of it that came from other workers


@dataclass(frozen=True, slots=True)
class PhaseTimed:
    """A phase is over. `num_bytes`: weights given up, KV sent and received, weights loaded."""

    phase: Phase
    seconds: float
    num_bytes: int


Breakage = Broken | Whole | FormerLost
GroupEvent = (
    Prepared | PrepareFailed | Committed | HandedOver | Adopted | Settled | PhaseTimed | Breakage
)

#: Takes events in the engine thread.
EventSink = Callable[[GroupEvent], None]
