"""Opening the key-value buckets of a deployment, with the one set of settings each of them has.

NATS refuses a bucket that exists with other settings, so nobody states them anywhere else.
"""

from __future__ import annotations

from shared.bus.base import Bus, KeyValue
from shared.subjects import Subjects

PLAN_HISTORY = 8


async def open_members(bus: Bus, subjects: Subjects, lease_ttl_seconds: float) -> KeyValue:
    """Leases of workers, routers and planners; a key not renewed for the TTL vanishes."""
    return await bus.key_value(subjects.members_bucket, ttl_seconds=lease_ttl_seconds)


async def open_leader(bus: Bus, subjects: Subjects, lease_ttl_seconds: float) -> KeyValue:
    """The lease of the leading planner."""
    return await bus.key_value(subjects.leader_bucket, ttl_seconds=lease_ttl_seconds)


async def open_plan(bus: Bus, subjects: Subjects) -> KeyValue:
    """The plan and the log of past transitions."""
    return await bus.key_value(subjects.plan_bucket, history=PLAN_HISTORY)


async def open_acks(bus: Bus, subjects: Subjects) -> KeyValue:
    """What each worker did with the plan; keyed by worker id."""
    return await bus.key_value(subjects.acks_bucket)
