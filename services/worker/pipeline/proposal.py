"""A layout that a worker is prepared for, or prepares for."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.worker.links.base import LinkFrame
from services.worker.pipeline.peers import GroupPeers
from services.worker.regrouping import Regrouping


@dataclass(slots=True)
class Proposal:
    """What may be committed.

    Attributes:
        peers: the group that is next, with its links; None where the worker shall serve alone.
        frames: from members that have committed before this worker.
        is_due: the plan has committed it; the layout before may have to come to rest first.
    """

    regrouping: Regrouping
    peers: GroupPeers | None
    frames: list[LinkFrame] = field(default_factory=list)
    is_due: bool = False
