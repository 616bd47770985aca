"""Several engines in one thread, linked as worker processes are, driven until nothing moves."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from services.worker.core import EngineCore
from services.worker.engine.block_manager import BlockManager
from services.worker.engine.config import SchedulerConfig
from services.worker.engine.request import Request
from services.worker.engine.routes import Route, RouteStage
from services.worker.engine.scheduler import Scheduler
from services.worker.kernels.cpu import CpuKernels
from services.worker.links.base import DownReason, Link, LinkFrame, LinkPeer, Transport
from services.worker.links.config import LinkConfig
from services.worker.links.link import StreamLink
from services.worker.links.shm import create_ring_memory
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.events import GroupEvent, HandedOver, Prepared, Settled
from services.worker.pipeline.handover import pack_request
from services.worker.pipeline.member import GroupMember
from services.worker.pipeline.messages import FrameKind, HandOver
from services.worker.pipeline.peers import GroupPeers
from services.worker.regrouping import Regrouping, pipeline_of
from shared.layout import GroupPlan, LayoutState, MemberPlan, Plan, Span
from shared.messages import TokenItem
from tests.conftest import DEADLINE_SECONDS
from tests.link_peer import connected_sockets, make_stream
from tests.tiny_models import NUM_LAYERS, VOCAB_SIZE
from tests.unit.model.model_helpers import BUDGET_BYTES, open_runner, random_tokens
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
    worker_id: str, runner: ModelRunner, num_blocks: int | None = None, num_tokens: int = 32
) -> Engine:
    config = SchedulerConfig(
        max_num_batched_tokens=num_tokens,
        max_num_seqs=16,
        max_model_len=MAX_MODEL_LEN,
        min_prefill_tokens=16,
    )
    scheduler = Scheduler(
        config,
        BlockManager(num_blocks or runner.num_blocks, runner.block_size),
        Route("replica", (RouteStage(worker_id, 0, NUM_LAYERS),)),
    )
    core = EngineCore(scheduler, runner)
    return Engine(worker_id, runner, scheduler, core, GroupMember(core, scheduler, runner))


@dataclass
class Cluster:
    """Engines that a test regroups as plans do; replicas at first."""

    engines: list[Engine]
    transport: Transport = Transport.SHM
    bandwidth: float | None = None  # of each link, in bytes per second
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        self.plan = self._plan(6, *([position] for position in range(len(self.engines))))
        self._before = self.plan

    @property
    def leader(self) -> Engine:
        return self.engines[0]

    @property
    def events(self) -> list[GroupEvent]:
        return [event for engine in self.engines for event in engine.events]

    # --- layouts ---------------------------------------------------------------------------------

    def prepare(self, *groups: Sequence[int], cuts: Sequence[Sequence[int]] = ()) -> None:
        """Let the engines get ready for groups of them, each named by its workers' numbers.

        Args:
            cuts: for each group where its layers are cut; evenly where it says nothing.
        """
        self._before, self.plan = self.plan, self._plan(self.plan.epoch + 2, *groups, cuts=cuts)
        links = self._links()
        for engine in self.engines:
            name = engine.worker_id
            regrouping = Regrouping.of(self.plan, name, pipeline_of(self._before, name))
            if regrouping.after == regrouping.before:
                continue
            peers = None
            if regrouping.after is not None:
                peers = GroupPeers(name, regrouping.after, links[name])
            engine.events.clear()
            engine.is_preparing = True
            engine.member.prepare(regrouping, peers)

    def commit(self, engines: Sequence[Engine] | None = None) -> None:
        """Let those that are preparing commit, or some of them."""
        for engine in self.engines if engines is None else engines:
            if engine.is_preparing:
                engine.is_preparing = False
                engine.member.commit()

    def call_off(self) -> None:
        """What is prepared will not be committed."""
        for engine in self.engines:
            if engine.is_preparing:
                engine.is_preparing = False
                engine.member.abandon()
                engine.events.clear()
        self.plan = self._before

    def change(self, *groups: Sequence[int], cuts: Sequence[Sequence[int]] = ()) -> None:
        """Regroup; returns when all have been told to commit."""
        changing = self._prepare_fully(*groups, cuts=cuts)
        self.commit(changing)

    def regroup(self, *groups: Sequence[int], cuts: Sequence[Sequence[int]] = ()) -> None:
        """Regroup; returns when nothing is left of the layout before."""
        changing = self._prepare_fully(*groups, cuts=cuts)
        self.commit(changing)
        self.run(self.has_settled)
        self.run(self._grants_agree)

    def has_settled(self) -> bool:
        """Whether nothing is left of the layout before, at those that took part."""
        return all(engine.event(Settled) for engine in self.engines if engine.events)

    def _prepare_fully(self, *groups: Sequence[int], cuts: Sequence[Sequence[int]]) -> list[Engine]:
        self.prepare(*groups, cuts=cuts)
        changing = [engine for engine in self.engines if engine.is_preparing]
        self.run(lambda: all(engine.event(Prepared) for engine in changing))
        return changing

    def _plan(self, epoch: int, *groups: Sequence[int], cuts: Sequence[Sequence[int]] = ()) -> Plan:
        names = [[self.engines[position].worker_id for position in group] for group in groups]
        cuts = cuts or [()] * len(groups)
        return Plan(
            term=1,
            epoch=epoch,
            state=LayoutState.DROPPING,
            model_id="tiny",
            num_layers=NUM_LAYERS,
            groups=tuple(
                make_group(workers, epoch, inner)
                for workers, inner in zip(names, cuts, strict=True)
            ),
            created_at=0.0,
        )

    def _links(self) -> dict[str, dict[str, StreamLink]]:
        """Links between the members of all pipelines that the plan is the first to have."""
        links: dict[str, dict[str, StreamLink]] = {e.worker_id: {} for e in self.engines}
        by_name = {engine.worker_id: engine for engine in self.engines}
        for group in self.plan.groups:
            for near, far in combinations([m.worker_id for m in group.members], 2):
                pair = _link(by_name[near], by_name[far], self.transport, self.bandwidth, group)
                links[near][far], links[far][near] = pair
        return links

    # --- time ------------------------------------------------------------------------------------

    def run(self, until: object = None) -> None:
        """Turn all engines until none has requests and the layout has settled, or until `until`."""
        ends_at = time.monotonic() + DEADLINE_SECONDS
        while not self._is_done(until):
            moved = [engine.turn() for engine in self.engines]
            if not any(moved):
                time.sleep(0.0005)
            assert time.monotonic() < ends_at, self.picture()

    def tokens(self, request_id: str) -> list[int]:
        """All tokens of a stream, whoever gave them; none may come twice."""
        items = [item for engine in self.engines for item in engine.of(request_id)]
        tokens: list[int] = []
        for item in sorted(items, key=lambda item: item.index):
            assert item.error == ""
            assert item.index == len(tokens)
            tokens += item.token_ids
        return tokens

    def check(self) -> None:
        """Nothing leaks on any worker."""
        self.quiesce()
        self.run(self._grants_agree)
        self.check_integrity()
        for engine in self.engines:
            blocks = engine.scheduler.blocks
            assert blocks.num_used(engine.worker_id) == 0
            assert blocks.stage.keys == ()

    def check_integrity(self) -> None:
        """Every block and every chunk has one owner, whatever runs."""
        for engine in self.engines:
            engine.core.check_integrity()
            engine.runner.pool.check_integrity()

    def is_running(self, request_id: str) -> bool:
        """Whether somebody still serves a request."""
        return any(
            key.request_id == request_id
            for engine in self.engines
            for key in engine.scheduler.requests
        )

    def resident_layers(self) -> list[tuple[Span, ...]]:
        """What each worker holds."""
        return [engine.runner.resident_layers for engine in self.engines]

    def _grants_agree(self) -> bool:
        """Whether what leaders may book is what was granted: else a frame is on its way."""
        return all(
            sum(other.scheduler.blocks.capacity(engine.worker_id) for other in others)
            == engine.scheduler.blocks.stage.num_granted_blocks
            for engine in self.engines
            if (others := [other for other in self.engines if other is not engine])
        )

    def picture(self) -> str:
        """Where everything stands, for a failing test."""
        return "; ".join(
            f"{engine.worker_id} {engine.core.load()}"
            f" in flight {engine.scheduler.num_batches_in_flight}"
            f" held {len(engine.scheduler.blocks.stage.keys)}"
            f" granted {engine.scheduler.blocks.stage.num_granted_blocks}"
            f" events {[type(event).__name__ for event in engine.events]}"
            for engine in self.engines
        )

    def _is_done(self, until: object) -> bool:
        if callable(until):
            return bool(until())
        return self.has_settled() and not any(engine.core.has_work for engine in self.engines)

    def quiesce(self) -> None:
        """Turn until every stage holds nothing any more."""
        self.run(lambda: all(not engine.scheduler.blocks.stage.keys for engine in self.engines))


def make_group(worker_ids: Sequence[str], epoch: int = 0, cuts: Sequence[int] = ()) -> GroupPlan:
    """A pipeline proposed at `epoch`; a replica where there is one worker."""
    num = len(worker_ids)
    inner = list(cuts) or [NUM_LAYERS * position // num for position in range(1, num)]
    members = tuple(
        MemberPlan(worker_id=worker_id, span=Span(start=start, end=end))
        for worker_id, start, end in zip(worker_ids, [0, *inner], [*inner, NUM_LAYERS], strict=True)
    )
    is_pipeline = num > 1
    return GroupPlan(
        group_id=f"p{epoch}-{worker_ids[0]}" if is_pipeline else f"g-{worker_ids[0]}",
        epoch=epoch if is_pipeline else 0,
        members=members,
    )


@contextmanager
def open_cluster(
    directory: Path,
    kernels: CpuKernels,
    num_workers: int = 2,
    transport: Transport = Transport.SHM,
    bandwidth: float | None = None,
    memory_bytes: int = BUDGET_BYTES,
    **engine: int,
) -> Iterator[Cluster]:
    """Replicas, of which the first is meant to lead."""
    names = [f"w{position}" for position in range(num_workers)]
    with ExitStack() as stack:
        runners = [
            stack.enter_context(open_runner(directory, kernels, memory_bytes)) for _ in names
        ]
        engines = [make_engine(n, r, **engine) for n, r in zip(names, runners, strict=True)]
        for each in engines:
            stack.callback(each.member.close)
        yield Cluster(engines, transport, bandwidth)


def _link(
    near: Engine, far: Engine, transport: Transport, bandwidth: float | None, group: GroupPlan
) -> tuple[StreamLink, StreamLink]:
    near_socket, far_socket = connected_sockets(transport)
    memory = create_ring_memory()
    streams = (
        make_stream(transport, near_socket, memory, is_acceptor=False),
        make_stream(transport, far_socket, memory, is_acceptor=True),
    )
    os.close(memory)
    config = LinkConfig(bandwidth_bytes_per_second=bandwidth, silence_seconds=30.0)
    links = tuple(
        StreamLink(
            stream,
            LinkPeer(peer.worker_id, group.group_id, 1, group.epoch),
            config,
            own.on_frame,
            own.on_down,
        )
        for stream, own, peer in zip(streams, (near, far), (far, near), strict=True)
    )
    for link in links:
        link.start()
    return links[0], links[1]


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


def add(cluster: Cluster, requests: list[Request], at: int = 0) -> None:
    for request in requests:
        assert cluster.engines[at].core.add(request) == []


def expect(cluster: Cluster, tokens: dict[str, list[int]]) -> None:
    for request_id, expected in tokens.items():
        assert cluster.tokens(request_id) == expected, request_id
