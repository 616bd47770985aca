"""Several engines in one thread, linked as worker processes are, driven until nothing moves."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from services.worker.channels.base import ChannelKind
from services.worker.engine.request import Request
from services.worker.kernels.cpu import CpuKernels
from services.worker.links.base import LinkPeer, Transport
from services.worker.links.config import LinkConfig
from services.worker.links.link import StreamLink
from services.worker.links.shm import create_ring_memory
from services.worker.pipeline.events import GroupEvent, Prepared, Settled
from services.worker.pipeline.peers import GroupPeers
from services.worker.regrouping import Regrouping, pipeline_of
from shared.layout import GroupPlan, LayoutState, MemberPlan, Plan, Span
from tests.conftest import DEADLINE_SECONDS
from tests.link_peer import connected_sockets, make_stream
from tests.tiny_models import NUM_LAYERS
from tests.unit.model.model_helpers import BUDGET_BYTES, open_runner
from tests.unit.pipeline.devices import Devices
from tests.unit.pipeline.pipeline_engine import Engine, make_engine, memory_of


@dataclass
class Cluster:
    """Engines that a test regroups as plans do; replicas at first."""

    engines: list[Engine]
    transport: Transport = Transport.SHM
    bandwidth: float | None = None  # of each link, in bytes per second
    devices: Devices = field(default_factory=Devices)
    links: list[StreamLink] = field(default_factory=list)  # all there ever were
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
                pair = self._link(by_name[near], by_name[far], group)
                links[near][far], links[far][near] = pair
                self.links += pair
        return links

    def _link(self, near: Engine, far: Engine, group: GroupPlan) -> tuple[StreamLink, StreamLink]:
        """Both ends of a link, as the handshake leaves them."""
        sockets = connected_sockets(self.transport)
        names = [member.worker_id for member in group.members]
        are_neighbours = names.index(far.worker_id) == names.index(near.worker_id) + 1
        tensors = self.devices.connect(
            near.worker_id, far.worker_id, sockets, len(names) if are_neighbours else 0
        )
        memory = create_ring_memory()
        streams = [
            make_stream(self.transport, each, memory, is_acceptor=each is sockets[1])
            for each in sockets
        ]
        os.close(memory)
        config = LinkConfig(bandwidth_bytes_per_second=self.bandwidth, silence_seconds=30.0)
        are_cpus = self.devices.kind is ChannelKind.HOST
        reads_memory = are_cpus and self.transport is Transport.SHM and self.bandwidth is None
        near_link, far_link = (
            StreamLink(
                stream,
                LinkPeer(peer.worker_id, group.group_id, 1, group.epoch),
                config,
                own.on_frame,
                own.on_down,
                peer_memory=memory_of(peer.runner) if reads_memory else None,
                tensors=channel,
            )
            for stream, channel, own, peer in zip(
                streams, tensors, (near, far), (far, near), strict=True
            )
        )
        near_link.start()
        far_link.start()
        return near_link, far_link

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
    devices: Devices | None = None,
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
        yield Cluster(engines, transport, bandwidth, devices or Devices())


def add(cluster: Cluster, requests: list[Request], at: int = 0) -> None:
    for request in requests:
        assert cluster.engines[at].core.add(request) == []


def expect(cluster: Cluster, tokens: dict[str, list[int]]) -> None:
    for request_id, expected in tokens.items():
        assert cluster.tokens(request_id) == expected, request_id
