"""What a worker is in one group: its leader, or a stage behind it."""

from __future__ import annotations

from typing import Protocol

from services.worker.batch_io import BatchOutcome
from services.worker.links.base import LinkFrame
from services.worker.pipeline.peers import GroupPeers


class Role(Protocol):
    """A worker's part in one group, from its commit until nobody is left on its pipeline."""

    @property
    def peers(self) -> GroupPeers:
        """The group, and the links to its other members."""
        ...

    @property
    def is_over(self) -> bool:
        """True when no other member needs this worker's part any more."""
        ...

    @property
    def is_busy(self) -> bool:
        """True while `pump` has something to do whatever arrives."""
        ...

    def handle(self, frame: LinkFrame, now: float) -> BatchOutcome | None:
        """Act on a frame of another member; a batch may have come back with it.

        Raises:
            MessageError: it cannot be read.
            ValueError: it is of another kind.
        """
        ...

    def pump(self) -> None:
        """Send what can be sent now."""
        ...

    def prepare_restore(self, epoch: int) -> None:
        """Get the missing layers back while the pipeline serves."""
        ...

    def undo_restore(self) -> None:
        """The pipeline stays."""
        ...

    def commit_restore(self) -> None:
        """Serve alone; what is on the pipeline leaves it bit by bit."""
        ...
