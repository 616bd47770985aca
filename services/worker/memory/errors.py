"""What can go wrong with a worker's memory."""

from __future__ import annotations

from shared.errors import ConfigError, KunserveError


class DeviceMemoryError(KunserveError):
    """The device or the operating system refused a memory operation."""


class OutOfChunksError(DeviceMemoryError):
    """More chunks were asked for than are free."""


class LedgerIntegrityError(DeviceMemoryError):
    """A chunk has no owner or two, or is mapped elsewhere than the ledger says."""


class DeviceMemoryTooSmallError(ConfigError):
    """The budget holds neither the weights nor the smallest useful KV cache."""
