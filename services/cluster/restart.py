"""When a child of `kunserve up` that has ended is started again. Pure: no clock, no process."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

EXIT_BAD_CONFIGURATION = 2


class Verdict(StrEnum):
    """What to do about a child that has ended by itself."""

    RESTART = "restart"
    REFUSED = "refused"  # it says that its configuration cannot work: so would the next one
    HOPELESS = "hopeless"  # it has never worked, and was tried often enough


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict; a restart comes after `delay_seconds`."""

    verdict: Verdict
    delay_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential back-off. A child that lived for `healthy_seconds` begins anew."""

    first_seconds: float = 0.5
    longest_seconds: float = 30.0
    healthy_seconds: float = 60.0
    first_attempts: int = 5

    def delay_seconds(self, failures: int) -> float:
        """Wait after the `failures`-th failure in a row, counted from 1."""
        doublings = min(failures - 1, 32)
        return min(self.first_seconds * 2.0**doublings, self.longest_seconds)


class RestartPolicy:
    """Judges the ends of one child, in order."""

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._starts = 0
        self._failures = 0

    @property
    def failures(self) -> int:
        """Failures in a row."""
        return self._failures

    def judge(self, exit_code: int, lived_seconds: float, *, cluster_was_ready: bool) -> Decision:
        """Decide about a child that ended after `lived_seconds` though nobody had asked it to.

        Exit code 2 is final only at the first start: a configuration that worked once is not
        what is wrong with a restart. Before the cluster was ever ready attempts are counted.
        """
        self._starts += 1
        if lived_seconds >= self._backoff.healthy_seconds:
            self._failures = 0
        self._failures += 1
        if exit_code == EXIT_BAD_CONFIGURATION and self._starts == 1:
            return Decision(Verdict.REFUSED)
        if not cluster_was_ready and self._failures >= self._backoff.first_attempts:
            return Decision(Verdict.HOPELESS)
        return Decision(Verdict.RESTART, self._backoff.delay_seconds(self._failures))
