"""What the worker has told the routers: the tokens of every request, to send them again.

A frame may get lost while NATS reconnects. The router then asks for everything from an index on
(`Resume`); a request is remembered until some time after its end for that. Pure bookkeeping: time
is an argument, nothing is sent here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.worker.pipeline.peers import GroupKey
from shared.messages import FinishReason, TokenItem

#: How long a finished request can still be asked for.
REMEMBER_SECONDS = 30.0
#: How long control messages for a stream that another worker serves are passed on: routers learn
#: who serves it from its next token, for which it may have to wait in a queue.
REMEMBER_MOVED_SECONDS = 600.0


@dataclass(slots=True)
class _Stream:
    """One accepted request and everything said about it; it ends here also by moving."""

    router_id: str
    attempt: int
    items: list[TokenItem] = field(default_factory=list)
    finished_at: float | None = None
    moved_to: str = ""
    moved_in: GroupKey | None = None

    def is_forgotten(self, now: float) -> bool:
        seconds = REMEMBER_MOVED_SECONDS if self.moved_to else REMEMBER_SECONDS
        return self.finished_at is not None and now - self.finished_at >= seconds


@dataclass(frozen=True, slots=True)
class StreamKey:
    """A request as the engine knows it."""

    request_id: str
    attempt: int


class StreamTable:
    """All streams of a worker, by request id."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}

    def open(self, request_id: str, attempt: int, router_id: str) -> None:
        """Begin a stream. A later attempt of the same request replaces the earlier one."""
        self._streams[request_id] = _Stream(router_id, attempt)

    def record(self, items: Iterable[TokenItem], now: float) -> dict[str, list[TokenItem]]:
        """Remember new items and sort them by the router they go to.

        Items of unknown or finished streams and of replaced attempts are dropped.
        """
        by_router: dict[str, list[TokenItem]] = {}
        for item in items:
            stream = self._streams.get(item.request_id)
            if stream is None or stream.attempt != item.attempt or stream.finished_at is not None:
                continue
            stream.items.append(item)
            if item.finish_reason is not None:
                stream.finished_at = now
            by_router.setdefault(stream.router_id, []).append(item)
        return by_router

    def move(
        self, request_id: str, attempt: int, worker_id: str, group: GroupKey, now: float
    ) -> list[TokenItem] | None:
        """End a stream here because `worker_id`, a member of `group`, serves it from now on.

        Returns:
            What was said of it; None if it is not open, so that nobody wants it any more.
        """
        if not self.is_open(request_id, attempt):
            return None
        stream = self._streams[request_id]
        stream.finished_at, stream.moved_to, stream.moved_in = now, worker_id, group
        items, stream.items = stream.items, []
        return items

    def lose_moved(self, group: GroupKey, now: float) -> dict[str, list[TokenItem]]:
        """End all streams that moved within a group that broke, by the router they go to.

        Whoever serves them may have died before anybody heard of it. Where it lives, or the stream
        is over, the router has a newer word and drops this one, or replays what was not lost.
        """
        by_router: dict[str, list[TokenItem]] = {}
        for request_id, stream in self._streams.items():
            if stream.moved_in == group:
                item = TokenItem(
                    request_id=request_id,
                    attempt=stream.attempt,
                    index=0,
                    finish_reason=FinishReason.LOST,
                )
                stream.items, stream.finished_at = [item], now
                stream.moved_to, stream.moved_in = "", None
                by_router.setdefault(stream.router_id, []).append(item)
        return by_router

    def adopt(
        self, request_id: str, attempt: int, router_id: str, items: Iterable[TokenItem]
    ) -> None:
        """Go on with a stream that another worker began."""
        self._streams[request_id] = _Stream(router_id, attempt, list(items))

    def moved_to(self, request_id: str, attempt: int) -> str:
        """The worker that serves a stream which moved; empty if it did not."""
        stream = self._streams.get(request_id)
        return "" if stream is None or stream.attempt != attempt else stream.moved_to

    def items_since(
        self, request_id: str, attempt: int, num_received: int
    ) -> list[TokenItem] | None:
        """The items that hold tokens from `num_received` on, or the end; None if unknown.

        An item may begin before `num_received`; the router drops what it already has.
        """
        stream = self._streams.get(request_id)
        if stream is None or stream.attempt != attempt:
            return None
        return [
            item
            for item in stream.items
            if item.index + len(item.token_ids) > num_received or item.finish_reason is not None
        ]

    def router_of(self, request_id: str) -> str | None:
        """Where the tokens of a request go; None if it is unknown."""
        stream = self._streams.get(request_id)
        return None if stream is None else stream.router_id

    def is_open(self, request_id: str, attempt: int) -> bool:
        """True while that attempt is accepted and not finished."""
        stream = self._streams.get(request_id)
        return stream is not None and stream.attempt == attempt and stream.finished_at is None

    def open_streams_of(self, router_id: str) -> list[StreamKey]:
        """Unfinished requests of one router."""
        return [
            StreamKey(request_id, stream.attempt)
            for request_id, stream in self._streams.items()
            if stream.router_id == router_id and stream.finished_at is None
        ]

    def routers(self) -> set[str]:
        """Routers with unfinished requests."""
        return {s.router_id for s in self._streams.values() if s.finished_at is None}

    @property
    def num_open(self) -> int:
        return sum(stream.finished_at is None for stream in self._streams.values())

    def forget_finished(self, now: float) -> None:
        """Drop what nobody will ask for any more."""
        self._streams = {
            request_id: stream
            for request_id, stream in self._streams.items()
            if not stream.is_forgotten(now)
        }
