"""One worker's engine without its thread, requests for it, and what it gives undisturbed."""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.worker.core import EngineCore, Model
from services.worker.engine.block_manager import BlockManager
from services.worker.engine.config import SchedulerConfig
from services.worker.engine.request import Request
from services.worker.engine.routes import Route
from services.worker.engine.scheduler import Scheduler
from services.worker.kernels.cpu import CpuKernels
from services.worker.links.base import DownReason, Link, LinkFrame
from services.worker.links.peer_memory import MappedPeerMemory
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.events import GroupEvent, HandedOver
from services.worker.pipeline.handover import pack_request
from services.worker.pipeline.member import GroupMember
from services.worker.pipeline.messages import FrameKind, HandOver
from shared.messages import TokenItem
from tests.late_model import LateModel, delay_samples
from tests.tiny_models import NUM_LAYERS, VOCAB_SIZE
from tests.unit.model.model_helpers import open_runner, random_tokens
from tests.unit.model.request_helpers import make_request

MAX_MODEL_LEN = 128
SAMPLINGS: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.95, "seed": 7},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logprobs": 2},
    {"temperature": 0.8, "seed": 3, "frequency_penalty": 0.7, "min_tokens": 15},
]


def make_requests(num: int, max_tokens: int = 20) -> list[Request]:
    return [
        make_request(
            f"r{index}",
            random_tokens(5 + 9 * index % 60, index, VOCAB_SIZE),
            max_tokens=max_tokens,
            ignore_eos=True,
            **SAMPLINGS[index % len(SAMPLINGS)],
        )
        for index in range(num)
    ]


def memory_of(runner: ModelRunner) -> MappedPeerMemory:
    """A worker's memory as others on the same host see it."""
    file = runner.pool.shareable_file
    assert file is not None
    return MappedPeerMemory(file)


@dataclass
class Engine:
    """One worker's engine without its thread."""

    worker_id: str
    runner: ModelRunner
    scheduler: Scheduler
    core: EngineCore
    member: GroupMember
    inbox: queue.SimpleQueue[LinkFrame] = field(default_factory=queue.SimpleQueue)
    downs: queue.SimpleQueue[tuple[Link, DownReason]] = field(default_factory=queue.SimpleQueue)
    items: list[TokenItem] = field(default_factory=list)
    events: list[GroupEvent] = field(default_factory=list)  # since the last layout was prepared
    is_preparing: bool = False
    unwanted: set[str] = field(default_factory=set)  # requests whose clients are gone

    def on_frame(self, link: Link, frame: LinkFrame) -> None:
        self.inbox.put(frame)

    def on_down(self, link: Link, reason: DownReason) -> None:
        self.downs.put((link, reason))

    def turn(self) -> bool:
        """What the engine thread does in one round; False if it found nothing to do."""
        now = time.monotonic()
        num_frames = self.inbox.qsize()
        for _ in range(num_frames):
            self.items += self.member.on_frame(self.inbox.get(), now)
        for _ in range(self.downs.qsize()):
            self.items += self.member.on_down(*self.downs.get())
        self.items += self.member.pump(now)
        self.items += self.core.step(now)
        self.items += self.member.pump(now)
        events = self.member.take_events()
        for event in events:
            if isinstance(event, HandedOver):
                self._send_requests(event)
        self.events += events
        self.runner.pool.unmap_stale(self.runner.pool.budget_bytes)
        return bool(num_frames or events or not self.core.is_waiting)

    def of(self, request_id: str) -> list[TokenItem]:
        return [item for item in self.items if item.request_id == request_id]

    def event(self, kind: type[GroupEvent]) -> bool:
        return any(isinstance(event, kind) for event in self.events)

    def _send_requests(self, event: HandedOver) -> None:
        requests = [
            pack_request(
                request, None if request.request_id in self.unwanted else (), time.monotonic()
            )
            for request in event.requests
        ]
        message = HandOver(
            worker_id=self.worker_id, num_blocks=event.num_blocks, requests=tuple(requests)
        )
        event.peers.send(event.heir, FrameKind.HAND_OVER, message)


def make_engine(
    worker_id: str,
    runner: ModelRunner,
    num_blocks: int | None = None,
    num_tokens: int = 32,
    *,
    late: bool = False,
) -> Engine:
    """An engine; `late`: as on a device that computes by itself, with steps that overlap."""
    config = SchedulerConfig(
        max_num_batched_tokens=num_tokens,
        max_num_seqs=16,
        max_model_len=MAX_MODEL_LEN,
        min_prefill_tokens=16,
        overlaps=late,
    )
    scheduler = Scheduler(
        config,
        BlockManager(num_blocks or runner.num_blocks, runner.block_size),
        Route.of_replica(worker_id, NUM_LAYERS),
    )
    model: Model = runner
    if late:
        rng = random.Random(worker_id)
        delay_samples(runner, lambda: rng.choice([0, 1, 3, 8]))
        model = LateModel(runner, lambda: rng.choice([0, 1, 1000]))
    core = EngineCore(scheduler, model)
    return Engine(worker_id, runner, scheduler, core, GroupMember(core, scheduler, runner))


def undisturbed(
    directory: Path, kernels: CpuKernels, requests: Sequence[Request]
) -> dict[str, list[int]]:
    """What a replica alone gives for each of the requests."""
    tokens = {}
    with open_runner(directory, kernels) as runner:
        for request in requests:
            engine = make_engine("alone", runner)
            assert engine.core.add(request) == []
            while engine.core.has_work:
                engine.turn()
            tokens[request.request_id] = [t for item in engine.items for t in item.token_ids]
    return tokens
