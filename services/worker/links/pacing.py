"""How fast and in what portions a link sends. Pure: time is an argument."""

from __future__ import annotations

MIN_CHUNK_BYTES = 64 * 1024
MAX_CHUNK_BYTES = 4 * 1024 * 1024
#: How much of the past is forgotten with each chunk.
_FADING = 0.1


class TokenBucket:
    """A link of limited bandwidth: what is sent occupies it for bytes / bandwidth seconds.

    Args:
        bytes_per_second: the bandwidth.
        burst_seconds: idle time that may be made up for; as long as a thread oversleeps.
    """

    def __init__(self, bytes_per_second: float, burst_seconds: float = 0.002) -> None:
        if bytes_per_second <= 0:
            raise ValueError(f"a bandwidth of {bytes_per_second} bytes/s carries nothing")
        self._bytes_per_second = bytes_per_second
        self._burst_seconds = burst_seconds
        self._busy_until = float("-inf")

    def reserve(self, nbytes: int, now: float) -> float:
        """Occupy the link with `nbytes` behind what it carries already.

        Returns:
            The time at which the last of the bytes is through.
        """
        start = max(self._busy_until, now - self._burst_seconds)
        self._busy_until = start + nbytes / self._bytes_per_second
        return self._busy_until


class ChunkSizer:
    """Cuts bulk so that a chunk takes about `chunk_seconds`, by measured or configured bandwidth.

    Args:
        chunk_seconds: what a CONTROL frame may have to wait.
        bytes_per_second: the configured bandwidth; None: what is measured.
    """

    def __init__(self, chunk_seconds: float, bytes_per_second: float | None = None) -> None:
        self._chunk_seconds = chunk_seconds
        self._limit = bytes_per_second
        self._bytes = self._seconds = 0.0  # of the recent past

    @property
    def measured_bytes_per_second(self) -> float | None:
        """Bytes by seconds of the recent past; None before the first `add`."""
        return self._bytes / self._seconds if self._seconds else None

    @property
    def chunk_bytes(self) -> int:
        """Size of the next chunk."""
        measured = self.measured_bytes_per_second
        rates = [rate for rate in (self._limit, measured) if rate is not None]
        if not rates:
            return MIN_CHUNK_BYTES
        return round(min(max(min(rates) * self._chunk_seconds, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES))

    def add(self, nbytes: int, seconds: float) -> None:
        """Take a measurement: a chunk of `nbytes` took `seconds`, pacing included.

        Bytes and seconds fade apart from each other, so a tiny chunk counts for little.
        """
        self._bytes = self._bytes * (1 - _FADING) + nbytes
        self._seconds = self._seconds * (1 - _FADING) + max(seconds, 0.0)
