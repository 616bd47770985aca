"""Restarts of `kunserve up`: when, how soon, and when not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cluster.restart import Backoff, Decision, RestartPolicy, Verdict


@pytest.fixture
def policy() -> RestartPolicy:
    return RestartPolicy(Backoff(1.0, 8.0, healthy_seconds=60.0, first_attempts=3))


def test_waits_twice_as_long_after_each_failure_up_to_a_bound(policy: RestartPolicy) -> None:
    decisions = [policy.judge(1, 0.1, cluster_was_ready=True) for _ in range(6)]
    assert [decision.delay_seconds for decision in decisions] == [1, 2, 4, 8, 8, 8]


def test_a_child_that_lived_long_begins_anew(policy: RestartPolicy) -> None:
    for _ in range(4):
        policy.judge(1, 0.1, cluster_was_ready=True)
    assert policy.judge(-9, 61.0, cluster_was_ready=True) == Decision(Verdict.RESTART, 1.0)


def test_bad_configuration_at_the_first_start_is_final(policy: RestartPolicy) -> None:
    assert policy.judge(2, 0.1, cluster_was_ready=False).verdict is Verdict.REFUSED


def test_bad_configuration_of_a_child_that_has_worked_is_a_fault_like_any_other(
    policy: RestartPolicy,
) -> None:
    policy.judge(-9, 100.0, cluster_was_ready=True)
    assert policy.judge(2, 0.1, cluster_was_ready=True).verdict is Verdict.RESTART


def test_attempts_are_counted_only_until_the_cluster_was_ready(policy: RestartPolicy) -> None:
    verdicts = [policy.judge(1, 0.1, cluster_was_ready=False).verdict for _ in range(3)]
    assert verdicts == [Verdict.RESTART, Verdict.RESTART, Verdict.HOPELESS]
    assert policy.judge(1, 0.1, cluster_was_ready=True).verdict is Verdict.RESTART


@given(st.integers(min_value=1, max_value=10**9))
def test_the_delay_never_leaves_its_bounds(failures: int) -> None:
    backoff = Backoff()
    assert backoff.first_seconds <= backoff.delay_seconds(failures) <= backoff.longest_seconds
