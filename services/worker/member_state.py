"""How far a worker is on its way from one layout to the next, and what it says of that. Pure.

SETTLED --PREPARE--> PREPARING --links up, layers here--> PREPARED --COMMIT--> COMMITTING
   ^  ^                  |                                    |                    | engine did it
   |  +---- another plan, no link, no room: called off -------+                 SETTLING
   +------------------- nothing is left on the layout before -----------------------+

The layouts are a pipeline's or a replica's; every change goes this way: drop, restore, and from one
pipeline to another. Where a group breaks, the way is shorter: RELOADING, from any state, and when
every layer is here, SETTLED as a replica.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from shared.errors import KunserveError
from shared.messages import AckState


class IllegalTransitionError(KunserveError):
    """A fault in the worker: a member cannot go from this state to that."""


class MemberState(Enum):
    """How far a worker is; `TRANSITIONS` says what may follow what."""

    SETTLED = auto()  # nothing is left of the layout before
    PREPARING = auto()  # opens links, gets missing layers; serves as before
    PREPARED = auto()  # has links and layers; serves as before
    COMMITTING = auto()  # the engine was told
    SETTLING = auto()  # serves in the new layout; requests of before are still moved
    RELOADING = auto()  # its group broke: gets missing layers back and serves nothing


TRANSITIONS: dict[MemberState, frozenset[MemberState]] = {
    MemberState.SETTLED: frozenset({MemberState.PREPARING, MemberState.RELOADING}),
    MemberState.PREPARING: frozenset({MemberState.PREPARED, MemberState.SETTLED}),
    MemberState.PREPARED: frozenset({MemberState.COMMITTING, MemberState.SETTLED}),
    MemberState.COMMITTING: frozenset({MemberState.SETTLING, MemberState.RELOADING}),
    MemberState.SETTLING: frozenset({MemberState.SETTLED, MemberState.RELOADING}),
    MemberState.RELOADING: frozenset({MemberState.SETTLED}),
}

#: What is said of the plan that the worker follows; None while there is no answer yet.
ANSWERS: dict[MemberState, AckState | None] = {
    MemberState.SETTLED: AckState.SETTLED,
    MemberState.PREPARING: None,
    MemberState.PREPARED: AckState.PREPARED,
    MemberState.COMMITTING: None,
    MemberState.SETTLING: AckState.APPLIED,
    MemberState.RELOADING: None,
}


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
