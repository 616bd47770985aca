"""How far a worker is in its group, and what it says of that. Pure.

ALONE --PREPARE--> PREPARING --links up--> PREPARED --COMMIT--> COMMITTING
  ^                    |                       |                    | the engine did it
  +---- another plan, or a link cannot be had -+                 SETTLING
  |                                                                 | all KV moved
LEAVING <--COMMIT-- RESTORED <--layers back-- RESTORING <--PREPARE-- GROUPED
                        |                         |                   ^
                        +------ called off -------+-------------------+
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from shared.errors import KunserveError
from shared.messages import AckState


class IllegalTransitionError(KunserveError):
    """A fault in the worker: a member cannot go from this state to that."""


class MemberState(Enum):
    """How far a worker is in its group; `TRANSITIONS` says what may follow what."""

    ALONE = auto()  # holds every layer and leads itself
    PREPARING = auto()  # opens links; serves as before
    PREPARED = auto()  # has links; serves as before
    COMMITTING = auto()  # the engine was told
    SETTLING = auto()  # serves its layers; requests of before are still moved
    GROUPED = auto()  # nothing is left of the layout before
    RESTORING = auto()  # gets its missing layers back; serves as before
    RESTORED = auto()  # holds every layer; serves as before
    LEAVING = auto()  # serves alone; requests of before are still on the pipeline


TRANSITIONS: dict[MemberState, frozenset[MemberState]] = {
    MemberState.ALONE: frozenset({MemberState.PREPARING}),
    MemberState.PREPARING: frozenset({MemberState.PREPARED, MemberState.ALONE}),
    MemberState.PREPARED: frozenset({MemberState.COMMITTING, MemberState.ALONE}),
    MemberState.COMMITTING: frozenset({MemberState.SETTLING}),
    MemberState.SETTLING: frozenset({MemberState.GROUPED}),
    MemberState.GROUPED: frozenset({MemberState.RESTORING}),
    MemberState.RESTORING: frozenset({MemberState.RESTORED, MemberState.GROUPED}),
    MemberState.RESTORED: frozenset({MemberState.LEAVING, MemberState.GROUPED}),
    MemberState.LEAVING: frozenset({MemberState.ALONE}),
}

#: What is said of a plan whose group is the one the worker is in.
ANSWERS: dict[MemberState, AckState] = {
    MemberState.PREPARED: AckState.PREPARED,
    MemberState.SETTLING: AckState.APPLIED,
    MemberState.GROUPED: AckState.SETTLED,
    MemberState.RESTORED: AckState.PREPARED,
    MemberState.LEAVING: AckState.APPLIED,
}


#: States in which there is no answer yet.
SILENT = frozenset({MemberState.PREPARING, MemberState.COMMITTING, MemberState.RESTORING})
#: States in which layers are missing.
INCOMPLETE = frozenset(
    {
        MemberState.COMMITTING,
        MemberState.SETTLING,
        MemberState.GROUPED,
        MemberState.RESTORING,
    }
)


@dataclass(slots=True)
class Placement:
    """Where the worker stands in the newest plan; changed by `Transition` only.

    Attributes:
        group_id: the group it serves in now; empty where no plan places it.
        is_leader: whether it takes requests for that group.
    """

    term: int = 0
    epoch: int = 0
    group_id: str = ""
    is_leader: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What the worker says to the newest plan."""

    term: int
    epoch: int
    state: AckState
    detail: str = ""
