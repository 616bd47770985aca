"""What the members of a group send each other on their links.

    leader --Microbatch, hidden--> stage 1 --Microbatch, hidden--> ... last --Tokens--> leader
    leader --Release, Order, Settle--> stage 1 --> stage 2 --> ...      down the chain, in order
    any    --KvPart--> any --KvTaken--> sender, --Filled--> leader      one request's KV
    any    --WeightsRequest--> any --WeightsPart--> asker               when layers are loaded
    follower --HandOver--> leader                                       once, when it has committed
    leader --HandOver--> who leads next --TakenOver--> leader           once, when it has committed
    follower --Capacity--> leader                                       when its blocks got more
    follower --ShrinkRequest--> leader --GiveBack--> all                when it shall get layers
    leader --Quiesce--> stage 1 --> stage 2 --> ...                     when no batch will follow
    leader --Dissolve--> stage 1 --> stage 2 --> ...                    when no request is left

All that the leader orders goes down the chain of stages with its batches, so that every stage sees
it in the order in which the leader booked it.
"""

from __future__ import annotations

from enum import IntEnum

from pydantic import Field

from services.worker.engine.request import KvKey
from services.worker.engine.routes import RouteStage, Transfer
from services.worker.memory.base import FileRun
from shared.messages import TokenItem, TokenLogprobs
from shared.sampling import SamplingParams
from shared.wire import Message, WireModel


class FrameKind(IntEnum):
    """`LinkFrame.kind`: which message the header is, and which tensor comes with it."""

    MICROBATCH = 1  # hidden states [num_tokens, hidden_size] in the type of the model's weights
    TOKENS = 2
    RELEASE = 3
    ORDER = 4
    KV_PART = 5  # blocks [num_layers, num_blocks, *kv_block_shape] in that type
    FILLED = 6
    HAND_OVER = 7
    CAPACITY = 8
    SETTLE = 9
    SHRINK_REQUEST = 10
    GIVE_BACK = 11
    DISSOLVE = 12
    QUIESCE = 13
    TAKEN_OVER = 14
    WEIGHTS_REQUEST = 15
    WEIGHTS = 16  # bytes of an arena, from the offset on
    RETREAT = 17
    KV_TAKEN = 18


class RowMessage(WireModel):
    """One row that the last stage samples; see `SamplingRow`.

    Token ids are packed, and empty where the request's penalties do not need them.
    """

    params: SamplingParams
    position: int
    prompt_token_ids: bytes = b""
    output_token_ids: bytes = b""
    forbidden_token_ids: tuple[int, ...] = ()


class Microbatch(Message):
    """A batch on its way; the columns have one entry for each request in it.

    Attributes:
        keys: whose tokens `[start, start + length)` are computed.
        token_ids: all of them, packed.
        rows: for each request that wants a token, in order.
        follows: the leader has had requests ever since the batch before.
    """

    step: int
    follows: bool
    keys: tuple[KvKey, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    wants_token: tuple[bool, ...]
    token_ids: bytes
    rows: tuple[RowMessage, ...]


class Tokens(Message):
    """The end of a microbatch: its tokens, one for each row, or why it failed."""

    step: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    error: str = ""


class Release(Message):
    """Free what these keys hold, by worker."""

    keys: dict[str, tuple[KvKey, ...]]


class Order(Message):
    """Let the KV of the first `num_tokens` tokens of a request travel.

    `serial` counts the leader's orders: a part that comes with a higher one than a stage has seen
    is early, and one for a key that the stage does not hold any more is not wanted.
    """

    serial: int
    key: KvKey
    num_tokens: int
    transfers: tuple[Transfer, ...]


class KvPart(Message):
    """KV of one request: `blocks` of its block table, of `layers`; half-open.

    Attributes:
        runs: where it lies in the source's memory, which stays so until it is taken; without it, it
            is in the buffer.
    """

    serial: int
    key: KvKey
    source: str
    layers: tuple[int, int]
    blocks: tuple[int, int]
    runs: tuple[FileRun, ...] = ()


class KvTaken(Message):
    """`worker_id` needs so many bytes of parts no more, because they are written or not wanted."""

    worker_id: str
    num_bytes: int


class Filled(Message):
    """All KV that an order sent to `worker_id` is there, or why it cannot be."""

    key: KvKey
    worker_id: str
    error: str = ""


class WeightsRequest(Message):
    """`worker_id` wants the bytes `[start, end)` of an arena, if it is packed as its own."""

    serial: int
    worker_id: str
    arena: str
    arena_bytes: int
    panel_width: int
    start: int
    end: int


class WeightsPart(Message):
    """Some of what a request asked for, or why it is not given.

    `worker_id` gives it, in the buffer, or at `runs` of its memory for as long as it has the arena.
    """

    serial: int
    worker_id: str
    offset: int
    runs: tuple[FileRun, ...] = ()
    error: str = ""


class Capacity(Message):
    """So many blocks more of `worker_id` may be booked by the leader."""

    worker_id: str
    num_blocks: int


class ShrinkRequest(Message):
    """`worker_id` shall get layers, as the plan of `epoch` says, and then has `num_blocks` left."""

    worker_id: str
    epoch: int
    num_blocks: int


class GiveBack(Message):
    """So many blocks less of each worker are booked by the leader.

    `epoch` is that of the plan for which the stages asked for it; 0 if they did not.
    """

    num_blocks: dict[str, int]
    epoch: int = 0


class Quiesce(Message):
    """No batch will come any more: layers of the pipeline may be given up."""


class Dissolve(Message):
    """No request is left on the pipeline: nobody needs its members any more."""


class Retreat(Message):
    """Layers given up keep the KV of these keys, by worker; the rest of their memory may be used.

    Workers that are not named keep all.
    """

    keys: dict[str, tuple[KvKey, ...]]


class Settle(Message):
    """No request is left on the layout before: its memory may be used."""


class RequestMessage(WireModel):
    """A request that changes its scheduler, and what its router has been told of it.

    Times are ages, because workers do not share a clock.

    Attributes:
        origin: where its KV lies; empty where it has none.
        is_wanted: False if its client went away meanwhile: only its KV is to be freed.
    """

    request_id: str
    router_id: str
    attempt: int
    prompt_token_ids: bytes
    output_token_ids: bytes
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    num_computed_tokens: int
    num_preemptions: int
    age_seconds: float
    queued_seconds: float | None
    origin_id: str = ""
    origin: tuple[RouteStage, ...] = ()
    is_wanted: bool = True
    items: tuple[TokenItem, ...] = Field(default=(), description="said to its router so far")

    @property
    def kv_key(self) -> KvKey:
        """What every stage knows its KV by."""
        return KvKey(self.request_id, self.attempt, self.num_preemptions)


class HandOver(Message):
    """Requests of `worker_id`, and how many of its blocks may be booked besides theirs.

    All requests of a follower for its leader; or queued ones of a leader for those who lead next.
    """

    worker_id: str
    num_blocks: int
    requests: tuple[RequestMessage, ...]


class TakenOver(Message):
    """`worker_id` has the requests that the leader handed over to it."""

    worker_id: str
