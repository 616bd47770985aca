"""Chaos for a test cluster: random events from a seed, and clients that stream all the while.

    script(seed) --> [Step, Step, ...]      the same for the same seed
    play(step)                              on a real cluster
    Clients                                 compare every answer with that of an undisturbed run

When an event happens is up to the machine; which one, to whom and how long is not.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Self

from tests.conftest import eventually
from tests.integration.clients import ANSWER_SECONDS, Answer, Stream
from tests.integration.harness import Cluster
from tests.integration.layouts import Operator


class Event(Enum):
    """What may happen."""

    DROP = auto()
    RESTORE = auto()
    PAUSE_WORKER = auto()
    KILL_WORKER = auto()
    KILL_PLANNER = auto()
    KILL_NATS = auto()


#: Hangs and absences: some that nobody takes for a death, some that everybody does.
PAUSE_SECONDS = (0.05, 0.2, 0.4, 1.5, 3.0)
#: From nothing at all to longer than any transition takes.
GAP_SECONDS = (0.0, 0.02, 0.1, 0.4, 1.5)


@dataclass(frozen=True)
class Step:
    """One event: what, to which workers, for how long, and how long nothing happens after it."""

    event: Event
    workers: tuple[int, ...]
    seconds: float
    gap_seconds: float


def script(seed: int, num_steps: int, num_workers: int, events: Mapping[Event, int]) -> list[Step]:
    """A sequence of events.

    Args:
        events: what may happen, and how often in relation to each other.
    """
    rng = random.Random(seed)
    kinds = rng.choices(list(events), list(events.values()), k=num_steps)
    return [_step(rng, event, num_workers) for event in kinds]


def _step(rng: random.Random, event: Event, num_workers: int) -> Step:
    num_named = 1
    if event in (Event.DROP, Event.RESTORE):
        num_named = rng.choice([0, 0, 1, rng.randint(1, num_workers)])
    workers = tuple(rng.sample(range(num_workers), num_named))
    return Step(event, workers, rng.choice(PAUSE_SECONDS), rng.choice(GAP_SECONDS))


async def play(step: Step, cluster: Cluster, operator: Operator) -> str:
    """Let a step happen; what was said of it, for the record of the test."""
    names = [cluster.workers[number].name for number in step.workers]
    said = ""
    match step.event:
        case Event.DROP | Event.RESTORE:
            status, answer = await operator.ask(step.event.name.lower(), *names)
            assert status in (200, 400, 503), answer
            said = answer["detail"] if status == 200 else answer["error"]["message"]
        case Event.PAUSE_WORKER:
            worker = cluster.workers[step.workers[0]]
            worker.pause()
            await asyncio.sleep(step.seconds)
            worker.resume()
        case Event.KILL_WORKER:
            worker = cluster.workers[step.workers[0]]
            worker.kill()
            await asyncio.sleep(step.seconds)
            worker.start()
            await cluster.wait_ready()
        case Event.KILL_PLANNER:
            planner = cluster.planners[0]
            planner.kill()
            await asyncio.sleep(step.seconds)
            planner.start()
        case Event.KILL_NATS:
            await cluster.nats.kill()
            await asyncio.sleep(step.seconds)
            await cluster.nats.start()
    await asyncio.sleep(step.gap_seconds)
    return f"{step.event.name.lower()} {' '.join(names)}: {said}"


@dataclass
class Clients:
    """Clients that ask one thing after the other; some lose interest in the middle.

    Args:
        undisturbed: the right answers, by body (as JSON).

    Attributes:
        num_answers: answers that came to their end.
        wrong: what was not as it should be.
    """

    url: str
    undisturbed: Mapping[str, Answer]
    seed: int
    num_clients: int
    num_answers: int = 0
    wrong: list[str] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aenter__(self) -> Self:
        rngs = [random.Random(f"{self.seed} {number}") for number in range(self.num_clients)]
        self._tasks = [asyncio.create_task(self._live(rng)) for rng in rngs]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def finish(self) -> None:
        """Ask nothing more, and wait until what was asked is answered."""
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def _live(self, rng: random.Random) -> None:
        bodies = list(self.undisturbed)
        while not self._stop.is_set():
            await self._ask(rng.choice(bodies), rng)

    async def _ask(self, body: str, rng: random.Random) -> None:
        stream = Stream(self.url, json.loads(body))
        try:
            if rng.random() < 0.3:
                most = rng.randint(0, len(self.undisturbed[body].token_ids))
                await eventually(
                    lambda: stream.is_over or stream.num_tokens >= most, ANSWER_SECONDS
                )
            else:
                await stream.result()
                self.num_answers += 1
            if not stream.answer.continues_as(self.undisturbed[body]):
                self.wrong.append(f"{body} was answered with {stream.answer}")
        except Exception as error:  # whatever it is, it is what the client got to see
            self.wrong.append(f"{body} failed: {error!r} after {stream.num_tokens} tokens")
        finally:
            await stream.disconnect()


async def ask_undisturbed(url: str, bodies: Sequence[dict[str, Any]]) -> dict[str, Answer]:
    """The right answers, one after the other, while nothing happens."""
    return {json.dumps(body): await Stream(url, body).result() for body in bodies}
