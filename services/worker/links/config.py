"""How links behave; made from the worker's settings."""

from __future__ import annotations

from dataclasses import dataclass

from services.worker.links.base import LinkClass

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """Figures of every link of a worker.

    Args:
        bandwidth_bytes_per_second: emulate a network of this bandwidth in each direction
            (`--link-bandwidth`), all classes together; None: as fast as it goes.
        chunk_seconds: what a CONTROL frame may wait behind bulk.
        heartbeat_seconds: a heartbeat follows that much silence of this side.
        silence_seconds: so much silence of the peer and it is down.
        exchange_limit_bytes, restore_limit_bytes: queued at most, see `Link.send`.
        close_seconds: what the threads get to end.
    """

    bandwidth_bytes_per_second: float | None = None
    chunk_seconds: float = 0.001
    heartbeat_seconds: float = 0.2
    silence_seconds: float = 0.8
    exchange_limit_bytes: int = 64 * MIB
    restore_limit_bytes: int = 64 * MIB
    close_seconds: float = 2.0

    @property
    def limit_bytes(self) -> dict[LinkClass, int]:
        """Limits as `FrameQueue` takes them."""
        return {
            LinkClass.EXCHANGE: self.exchange_limit_bytes,
            LinkClass.RESTORE: self.restore_limit_bytes,
        }
