"""What a plan makes of a worker and of the group that it serves in. Pure.

    pairs to a four     AB, CD -> ABCD     layers are given up: AB and CD must come to rest first
    a four to pairs     ABCD -> AB, CD     layers come back: ABCD serves until nobody is left on it
    whole again         AB     -> A, B     the same

All members of the group before derive the same from the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.layout import GroupPlan, Plan, Span


@dataclass(frozen=True, slots=True)
class Regrouping:
    """A change of the layout as one worker sees it; equal if it leads from and to the same.

    Attributes:
        epoch: of the plan in which the worker read it.
        before: the pipeline that it serves in; None for a replica.
        after: the group that it shall serve in; None for a replica.
        groups: the groups that the members of `before` go to.
    """

    epoch: int = field(compare=False)
    num_layers: int
    before: GroupPlan | None
    after: GroupPlan | None
    groups: tuple[GroupPlan, ...] = ()

    @classmethod
    def of(cls, plan: Plan, worker_id: str, before: GroupPlan | None) -> Regrouping:
        """What `plan` makes of a worker of the pipeline `before`."""
        own = pipeline_of(plan, worker_id)
        members = before.members if before is not None else ()
        found = [plan.group_of(member.worker_id) for member in members]
        return cls(
            epoch=plan.epoch,
            num_layers=plan.num_layers,
            before=before,
            after=own,
            groups=tuple(group for group in found if group is not None),
        )

    def span_after(self, worker_id: str) -> Span:
        """The layers of a member of `before` from then on; whoever has no group serves alone."""
        spans = {m.worker_id: m.span for group in self.groups for m in group.members}
        return spans.get(worker_id, Span(start=0, end=self.num_layers))

    @property
    def heirs(self) -> dict[str, int]:
        """The members of `before` that lead from then on, and how many members each then has."""
        members = {m.worker_id for m in self.before.members} if self.before is not None else set()
        return {g.leader: len(g.members) for g in self.groups if g.leader in members}

    @property
    def loads(self) -> bool:
        """True if some member of `before` needs layers that it does not serve now."""
        members = self.before.members if self.before is not None else ()
        return any(not _contains(m.span, self.span_after(m.worker_id)) for m in members)

    @property
    def stops(self) -> bool:
        """True if `before` cannot serve beside what follows it.

        A member gives up layers, or the leader's requests are led by somebody else.
        """
        if self.before is None:
            return False
        leader = self.before.leader
        follows = any(
            leader in [member.worker_id for member in group.members[1:]] for group in self.groups
        )
        return follows or any(
            not _contains(self.span_after(m.worker_id), m.span) for m in self.before.members
        )


def pipeline_of(plan: Plan, worker_id: str) -> GroupPlan | None:
    """The group of a worker if it has other members."""
    group = plan.group_of(worker_id)
    return None if group is None or len(group.members) == 1 else group


def _contains(outer: Span, inner: Span) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end
