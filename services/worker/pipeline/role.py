"""What a worker is in one group: its leader, or a stage behind it."""

from __future__ import annotations

from typing import Protocol

from services.worker.batch_io import BatchOutcome
from services.worker.links.base import LinkFrame
from services.worker.pipeline.peers import GroupPeers
from services.worker.regrouping import Regrouping


class Role(Protocol):
    """A worker's part in one group, from its commit until nobody is left on its pipeline."""

    @property
    def peers(self) -> GroupPeers:
        """The group, and the links to its other members."""
        ...

    def handle(self, frame: LinkFrame, now: float) -> BatchOutcome | None:
        """Act on a frame of another member; a batch may have come back with it.

        Raises:
            MessageError: it cannot be read.
            ValueError: it is of another kind.
        """
        ...

    def pump(self) -> None:
        """Do what is due and send what can be sent."""
        ...

    @property
    def is_busy(self) -> bool:
        """True while `pump` has something to do whatever arrives."""
        ...

    @property
    def owes_answers(self) -> bool:
        """True while tokens are being computed here that the leader waits for."""
        ...

    # --- the layout before -----------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """True if no request of the group is left on another route."""
        ...

    def settle(self) -> None:
        """Nothing is left of the layouts before; called once."""
        ...

    # --- the next layout -------------------------------------------------------------------------

    def prepare(self, regrouping: Regrouping) -> None:
        """Get the layers that are needed next, while the pipeline serves."""
        ...

    def undo(self) -> None:
        """What was prepared will not be: the pipeline stays."""
        ...

    @property
    def is_quiet(self) -> bool:
        """True if no batch is on its way through the pipeline, and none will be."""
        ...

    def leave(self, regrouping: Regrouping, now: float) -> None:
        """Another layout serves from now on; this role is a former one."""
        ...

    @property
    def is_over(self) -> bool:
        """True when nobody needs this worker's part any more."""
        ...
