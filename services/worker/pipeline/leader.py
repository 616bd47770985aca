"""Stage 0 of a pipeline: sends the scheduler's batches into it, and orders KV to travel.

    submit(batch)  -> embedding, own layers -> next stage ... last stage -> handle -> outcome
    order(...)     -> KV travels between the stages
    leave(...)     -> another group is next: requests leave; when none is left, Dissolve

Runs in the engine thread. What a worker does for all pipelines that it leads is in `leadership.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog

from services.worker.batch_io import BatchOutcome, batch_input
from services.worker.engine.exchange import Exchange
from services.worker.engine.outputs import SchedulerOutput
from services.worker.engine.releases import ReleasedKeys
from services.worker.engine.request import KvKey, Request, RequestKey, RequestStatus
from services.worker.engine.scheduler import Scheduler
from services.worker.links.base import LinkFrame
from services.worker.model.runner import ModelRunner
from services.worker.model.sampler import SampledToken
from services.worker.pipeline.adoption import adopt_all
from services.worker.pipeline.departure import Departure
from services.worker.pipeline.events import EventSink, Phase
from services.worker.pipeline.leader_preparation import LeaderPreparation
from services.worker.pipeline.messages import (
    Capacity,
    Filled,
    FrameKind,
    GiveBack,
    HandOver,
    Order,
    Quiesce,
    Release,
    Settle,
    ShrinkRequest,
    TakenOver,
    Tokens,
)
from services.worker.pipeline.peers import GroupPeers
from services.worker.pipeline.phase_timer import PhaseTimer
from services.worker.pipeline.restoration import Restoration
from services.worker.pipeline.retreat import Retreats
from services.worker.pipeline.rows import microbatch
from services.worker.pipeline.traffic import BulkTraffic
from services.worker.regrouping import Regrouping


class PipelineLeader:
    """What the leader of a group does with its links, from its commit on."""

    def __init__(
        self,
        peers: GroupPeers,
        runner: ModelRunner,
        scheduler: Scheduler,
        emit: EventSink,
        flush_releases: Callable[[], None],
    ) -> None:
        """Take the scheduler that serves the group from `begin` on.

        Args:
            flush_releases: tells all stages that this worker leads whose blocks to free.
        """
        self.peers = peers
        self._runner = runner
        self._scheduler = scheduler
        self._emit = emit
        self._flush_releases = flush_releases
        self._timer = PhaseTimer(emit)
        self._was_idle = True
        self._traffic = BulkTraffic(peers, runner, self._table, self._note_filled)
        self._in_flight: dict[int, SchedulerOutput] = {}
        self._num_orders = 0
        self._retreats = Retreats(peers, runner, scheduler)
        self._awaited = set(peers.followers)  # have not handed over yet
        self._preparation: LeaderPreparation | None = None
        self._departure: Departure | None = None
        self._shrink_requests: list[ShrinkRequest] = []
        self._log = structlog.get_logger(component="leader", group=peers.key.group_id)

    def begin(self, *, parks: bool) -> None:
        """Serve the layers of this stage and no others.

        Args:
            parks: the layout before does not serve any more: all requests that have KV wait for
                the exchange. No batch may be in flight.
        """
        self._scheduler.relocation.enter(self.peers.route)
        if parks:
            self._scheduler.relocation.park_running()
        self._scheduler.blocks.grow(self._runner.keep(self.peers.span))
        self._was_idle = not self._scheduler.requests

    def handle(self, frame: LinkFrame, now: float) -> BatchOutcome | None:
        """Act on a frame of a follower; a batch may have come back with it.

        Raises:
            MessageError: it cannot be read.
            ValueError: it is of another kind.
        """
        match frame.kind:
            case FrameKind.TOKENS:
                return self._outcome(Tokens.decode(frame.header))
            case FrameKind.HAND_OVER:
                self._take_over(HandOver.decode(frame.header), now)
            case FrameKind.CAPACITY:
                capacity = Capacity.decode(frame.header)
                self._scheduler.blocks.add_capacity(capacity.worker_id, capacity.num_blocks)
            case FrameKind.FILLED:
                self._filled(Filled.decode(frame.header))
            case FrameKind.TAKEN_OVER:
                self._taken_over(TakenOver.decode(frame.header))
            case FrameKind.SHRINK_REQUEST:
                self._shrink_requests.append(ShrinkRequest.decode(frame.header))
            case _:
                self._traffic.handle(frame)
        return None

    def pump(self) -> None:
        """Make room, load a part of the model, let requests leave, send KV: whatever is due."""
        if self._preparation is not None:
            self._pump_preparation(self._preparation)
        if self._departure is not None:
            self._departure.pump()
        self._flush_releases()
        self._traffic.pump()

    @property
    def is_busy(self) -> bool:
        """True while `pump` has something to do whatever arrives."""
        is_loading = self._preparation is not None and self._preparation.is_busy
        return is_loading or self._traffic.is_busy

    @property
    def owes_answers(self) -> bool:
        """False: the last stage has the tokens."""
        return False

    # --- the next layout -------------------------------------------------------------------------

    def prepare(self, regrouping: Regrouping) -> None:
        """Make room for what the members need next, and get what is missing here."""
        span = regrouping.span_after(self.peers.worker_id)
        restoration = Restoration(
            self._runner, self._traffic.weights, self._emit, regrouping.epoch, span
        )
        self._preparation = LeaderPreparation(
            self.peers, self._scheduler, restoration, self._emit, self._give_back
        )

    def undo(self) -> None:
        """The pipeline stays."""
        if self._preparation is not None:
            self._preparation.undo()
            self._preparation = None

    @property
    def is_quiet(self) -> bool:
        """True if no batch is in flight: a paused scheduler makes none."""
        return self._scheduler.num_batches_in_flight == 0

    def leave(self, regrouping: Regrouping, now: float) -> None:
        """Another layout serves from now on; requests and grants leave this pipeline."""
        after, own = regrouping.after, self.peers.worker_id
        following = {m.worker_id for m in after.members} if after is not None else set()
        is_led_here = after is not None and after.leader == own
        self._preparation = None
        self._departure = Departure(
            self.peers,
            self._scheduler,
            self._emit,
            self._flush_releases,
            following if is_led_here else (),
            is_superseded=regrouping.stops and following.issuperset(self.peers.route.worker_ids),
        )
        self._departure.hand_on_queued(regrouping.heirs)
        if regrouping.stops:
            self._flush_releases()
            self.peers.send_next(FrameKind.QUIESCE, Quiesce())

    def _taken_over(self, message: TakenOver) -> None:
        if self._departure is not None:
            self._departure.awaited.discard(message.worker_id)

    def _pump_preparation(self, preparation: LeaderPreparation) -> None:
        for request in self._shrink_requests:
            if request.epoch == preparation.epoch:
                preparation.note(request)
        self._shrink_requests = [r for r in self._shrink_requests if r.epoch > preparation.epoch]
        preparation.pump()

    def _give_back(self, message: GiveBack) -> None:
        self._flush_releases()
        self.peers.send_next(FrameKind.GIVE_BACK, message)

    @property
    def is_over(self) -> bool:
        """True when the pipeline is dissolved."""
        return self._departure is not None and self._departure.is_over

    # --- the layout before -----------------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        """True when all members have handed over; before, they seem to have no blocks at all."""
        return not self._awaited

    @property
    def is_settled(self) -> bool:
        """True if no request is left on another route."""
        return self.is_complete and self._scheduler.relocation.is_settled

    def settle(self) -> None:
        """No KV of layers given up is needed any more."""
        self.peers.send_next(FrameKind.SETTLE, Settle())
        self._timer.over(Phase.EXCHANGE, self._traffic.kv.num_bytes, self._traffic.kv.began_at)

    # --- batches ---------------------------------------------------------------------------------

    def submit(self, output: SchedulerOutput) -> None:
        """Compute a batch's first layers and send it on; its outcome comes as a Tokens frame."""
        if not self._was_idle:
            self._timer.next_over(Phase.FIRST_BATCH)
        slices, rows = batch_input(output)
        batch = self._runner.make_batch(slices)
        hidden = self._runner.forward(batch, self._runner.embed(batch), self.peers.span)
        message = microbatch(output, slices, rows, follows=self._runner.meter.batch_sent())
        self._flush_releases()  # first: what this batch takes may be what they free
        self._in_flight[output.step] = output
        self.peers.send_next(FrameKind.MICROBATCH, message, hidden)

    def _outcome(self, message: Tokens) -> BatchOutcome:
        if not self._was_idle:
            self._timer.next_over(Phase.FIRST_TOKEN)
        sampled = map(SampledToken, message.token_ids, message.logprobs)
        return BatchOutcome(self._in_flight.pop(message.step), tuple(sampled), message.error)

    def release(self, released: ReleasedKeys) -> None:
        """Tell the stages whose blocks they shall free."""
        keys = {w: keys for w, keys in released.items() if w in self.peers.followers}
        if keys:
            self.peers.send_next(FrameKind.RELEASE, Release(keys=keys))

    # --- requests that join ----------------------------------------------------------------------

    def _take_over(self, message: HandOver, now: float) -> None:
        """A follower's requests and its blocks are the leader's now."""
        refused = adopt_all(self._scheduler, message, self.peers.route, self._emit, now)
        blocks = self._scheduler.blocks
        for request in refused:
            keys: tuple[KvKey, ...] = (request.kv_key,)
            homes = {stage.worker_id: keys for stage in request.origin}
            self.peers.send_next(FrameKind.RELEASE, Release(keys=homes))
            for worker_id in homes:
                blocks.add_capacity(worker_id, blocks.blocks_for(request.num_computed_tokens))
        blocks.add_capacity(message.worker_id, message.num_blocks)
        self._awaited.discard(message.worker_id)
        if self.is_complete:
            self._timer.next_over(Phase.HAND_OVER)

    # --- KV that travels -------------------------------------------------------------------------

    def reaches(self, exchange: Exchange) -> bool:
        """True if the pipeline's links can carry the KV of an exchange."""
        workers = {w for t in exchange.transfers for w in (t.source, t.destination)}
        return workers.issubset(self.peers.route.worker_ids)

    def _filled(self, message: Filled) -> None:
        """Another stage has all KV of a request, or cannot have it."""
        if not message.error:
            self._scheduler.relocation.filled(message.key, message.worker_id)
            return
        request = self._exchanging(message.key)
        if request is not None:
            self._log.error("KV did not travel", request=request.request_id, reason=message.error)
            self._scheduler.relocation.give_up(request)

    def order(self, exchange: Exchange) -> None:
        """Let the KV of a request travel; room for it has been booked."""
        self._num_orders += 1
        order = Order(
            serial=self._num_orders,
            key=exchange.request.kv_key,
            num_tokens=exchange.request.num_computed_tokens,
            transfers=exchange.transfers,
        )
        self._flush_releases()  # first: what this order takes may be what they free
        self.peers.send_next(FrameKind.ORDER, order)
        self._traffic.kv.obey(order)

    def make_room(self) -> None:
        """Let the stages use the memory of KV that has travelled, where that is enough by now."""
        if self._preparation is None and not self._traffic.kv.is_read:
            self._retreats.order()

    def _note_filled(self, key: KvKey) -> None:
        self._scheduler.relocation.filled(key, self.peers.worker_id)

    def _table(self, key: KvKey) -> Sequence[int] | None:
        request = self._exchanging(key)
        return None if request is None else request.block_table

    def _exchanging(self, key: KvKey) -> Request | None:
        request = self._scheduler.requests.get(RequestKey(key.request_id, key.attempt))
        if request is None or request.kv_key != key:
            return None
        return request if request.status is RequestStatus.EXCHANGING else None
