"""The members of a deployment as last heard: a pure table of leases.

Absence counts only where it can be trusted. While the table is *held* members may join and change
but none leaves. Used by `shared.membership.MemberView`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from shared.bus.base import KeyValueEntry
from shared.messages import PlannerInfo, RouterInfo, WorkerInfo
from shared.wire import MessageError

MemberInfo = WorkerInfo | RouterInfo | PlannerInfo

_KINDS: Mapping[str, type[WorkerInfo] | type[RouterInfo] | type[PlannerInfo]] = {
    "worker": WorkerInfo,
    "router": RouterInfo,
    "planner": PlannerInfo,
}


def decode_member(entry: KeyValueEntry) -> MemberInfo:
    """The member behind an entry of the members bucket; raises MessageError."""
    kind = entry.key.partition(".")[0]
    if kind not in _KINDS:
        raise MessageError(f"members key {entry.key!r} is of no known kind")
    return _KINDS[kind].decode(entry.value or b"")


class MemberEventKind(StrEnum):
    """What happened to a member."""

    JOINED = "joined"
    CHANGED = "changed"
    RESTARTED = "restarted"  # same id, another process
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class MemberEvent:
    """One change of the membership; `info` is the last known where the member has left."""

    kind: MemberEventKind
    key: str
    info: MemberInfo


class MemberTable:
    """The members as last heard. Pure: time is an argument, in seconds of one clock."""

    def __init__(self, ttl_seconds: float) -> None:
        self._ttl_seconds = ttl_seconds
        self._members: dict[str, tuple[MemberInfo, int]] = {}
        self._newest_revision = 0
        self._held_until = 0.0

    @property
    def members(self) -> dict[str, MemberInfo]:
        """All members by key."""
        return {key: info for key, (info, _) in self._members.items()}

    def is_held(self, now: float) -> bool:
        """True while absence proves nothing."""
        return now < self._held_until

    def hold(self, now: float) -> None:
        """Let nobody leave for one TTL: the time in which every living member renews."""
        self._held_until = now + self._ttl_seconds

    def put(self, key: str, info: MemberInfo, revision: int) -> list[MemberEvent]:
        """Note one lease; stale news change nothing."""
        before = self._members.get(key)
        if before is not None and revision <= before[1]:
            return []
        self._newest_revision = max(self._newest_revision, revision)
        return self._store(key, info, revision)

    def replace(
        self, present: Mapping[str, tuple[MemberInfo, int]], unreadable: set[str], now: float
    ) -> list[MemberEvent]:
        """Note a reading of the whole bucket.

        Args:
            present: info and revision of each key.
            unreadable: keys whose value is no member; they keep the member known before.
        """
        newest = max((revision for _, revision in present.values()), default=0)
        lost_store = newest < self._newest_revision and self._lost_all_but(present)
        if lost_store:
            self.hold(now)
        self._newest_revision = newest if lost_store else max(newest, self._newest_revision)
        events: list[MemberEvent] = []
        for key, (info, revision) in present.items():
            events += self._store(key, info, revision)
        if not self.is_held(now):
            for key in self._members.keys() - present.keys() - unreadable:
                events.append(MemberEvent(MemberEventKind.LEFT, key, self._members.pop(key)[0]))
        return events

    def _lost_all_but(self, present: Mapping[str, tuple[MemberInfo, int]]) -> bool:
        """True where every known lease is missing or older than it was: the store began anew."""
        known = [(key, revision) for key, (_, revision) in self._members.items()]
        return bool(known) and all(
            key not in present or present[key][1] < revision for key, revision in known
        )

    def _store(self, key: str, info: MemberInfo, revision: int) -> list[MemberEvent]:
        before = self._members.get(key)
        self._members[key] = (info, revision)
        if before is None:
            return [MemberEvent(MemberEventKind.JOINED, key, info)]
        if before[0] == info:
            return []
        if _process(before[0]) != _process(info):
            return [MemberEvent(MemberEventKind.RESTARTED, key, info)]
        return [MemberEvent(MemberEventKind.CHANGED, key, info)]


def _process(info: MemberInfo) -> str:
    """What tells a process from its successor of the same name."""
    if isinstance(info, WorkerInfo):
        return info.incarnation
    return f"{info.host} {info.pid} {info.started_at}"
