"""Every message on the bus: one pydantic model each, msgpack on the wire.

Models carry a version and ignore unknown fields, so that services of neighbouring releases can
talk. Token ids travel as packed little-endian int32 bytes (4 bytes a token instead of up to 5,
and no per-token Python objects while decoding).

Who sends what is drawn in `shared/subjects.py`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from shared.layout import Plan, Span
from shared.sampling import SamplingParams
from shared.wire import Message, MessageError, WireModel, first_problem, unpack


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Encode token ids as little-endian int32."""
    packed = array("i", token_ids)
    return packed.tobytes()


def unpack_token_ids(data: bytes) -> list[int]:
    """Decode what `pack_token_ids` made; raises MessageError on a ragged length."""
    if len(data) % 4:
        raise MessageError(f"packed token ids of {len(data)} bytes are not whole int32 values")
    unpacked = array("i")
    unpacked.frombytes(data)
    return unpacked.tolist()


# --- requests: router -> worker ------------------------------------------------------------------


class GenerateRequest(Message):
    """Generate tokens for one prompt. Sent to the leader of the group that shall serve it.

    A replay (after a worker died) carries the tokens the client already has in `output_token_ids`;
    the worker continues after them and numbers its tokens from their count, so that seeds,
    penalties and `min_tokens` mean the same as in an undisturbed run.
    """

    request_id: str
    router_id: str
    attempt: int = Field(ge=0)
    group_id: str
    epoch: int
    dispatch_number: int = Field(ge=1, description="counts the router's requests to this worker")
    prompt_token_ids: bytes
    output_token_ids: bytes = b""
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    traceparent: str = ""


class GenerateStatus(StrEnum):
    """What a worker said to a GenerateRequest."""

    ACCEPTED = "accepted"
    OVERLOADED = "overloaded"  # queue full: try another worker, or later
    DRAINING = "draining"  # takes no new requests
    STALE_EPOCH = "stale_epoch"  # the router's picture of the layout is old
    TOO_LONG = "too_long"  # can never fit this worker's KV pool or context
    INVALID = "invalid"  # the request itself is wrong


class GenerateReply(Message):
    """Answer to a GenerateRequest; `detail` is a sentence for the client where it is refused."""

    status: GenerateStatus
    detail: str = ""


# --- control: router or planner -> worker --------------------------------------------------------


class Cancel(Message):
    """The client is gone: free the request's KV within a step. Idempotent, needs no answer."""

    kind: Literal["cancel"] = "cancel"
    request_id: str
    attempt: int


class Resume(Message):
    """Frames of a stream were lost: send its tokens again from `num_received` on.

    Answered with a ResumeReply. Used after a gap in the indices, a reconnect, or a silent while.
    """

    kind: Literal["resume"] = "resume"
    request_id: str
    attempt: int
    num_received: int = Field(ge=0, description="output tokens the router has, replayed included")


class ResumeReply(Message):
    """Whether the worker knows the request; where it does not, the router replays it elsewhere."""

    known: bool


class Drain(Message):
    """Take no new requests, finish the running ones; answered with an AdminReply."""

    kind: Literal["drain"] = "drain"


class Ping(Message):
    """Are you there? Answered with an empty payload; a dead worker answers 503 by the server."""

    kind: Literal["ping"] = "ping"


Control = Annotated[Cancel | Resume | Drain | Ping, Field(discriminator="kind")]
_CONTROL: TypeAdapter[Cancel | Resume | Drain | Ping] = TypeAdapter(Control)


def decode_control(payload: bytes) -> Cancel | Resume | Drain | Ping:
    """Parse a message of a worker's control subject; raises MessageError."""
    try:
        return _CONTROL.validate_python(unpack(payload, "Control"))
    except ValidationError as error:
        raise MessageError(f"malformed Control: {first_problem(error)}") from error


# --- tokens: worker -> router --------------------------------------------------------------------


class FinishReason(StrEnum):
    """Why a request ended (vLLM's names, and LOST, which no client sees)."""

    STOP = "stop"  # an end-of-sequence or stop token
    LENGTH = "length"  # max_tokens or the model's context is reached
    ABORT = "abort"  # cancelled
    ERROR = "error"  # the worker failed it; `error` says why
    LOST = "lost"  # its KV is gone through no fault of its own: the router replays it


class TokenLogprobs(WireModel):
    """Log-probabilities of one generated token and of the most likely alternatives."""

    logprob: float
    rank: int = Field(description="1 is the most likely token")
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class TokenItem(WireModel):
    """New tokens of one request in one engine step.

    `index` is the position of the first of them among the request's output tokens (replayed ones
    counted), so a router sees gaps and repetitions. `token_ids` may be empty on a finishing item.
    One that ends with LOST has index 0: it holds whatever the router has received so far.
    """

    request_id: str
    attempt: int
    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str = ""
    queued_seconds: float | None = Field(
        default=None, description="with the first output token: how long it waited for a seat"
    )


class TokenFrame(Message):
    """All new tokens of one engine step for one router."""

    worker_id: str
    group_id: str
    epoch: int
    step: int
    items: tuple[TokenItem, ...]


# --- load: worker -> routers and planners --------------------------------------------------------


class LoadReport(Message):
    """A group leader's load, sent every `load_interval_seconds` and on change.

    `received` says, per router, the `dispatch_number` of the last request that these figures
    include; the router forgets its own bookings up to there (Llumnix's instant and accurate load).
    """

    worker_id: str
    group_id: str
    epoch: int
    block_size: int
    kv_blocks_total: int
    kv_blocks_used: int
    requests_running: int
    requests_waiting: int
    waiting_blocks: int = Field(description="KV blocks that all waiting requests need to start")
    num_preemptions: int = 0
    draining: bool = False
    received: dict[str, int] = Field(default_factory=dict)


class QueueReport(Message):
    """What waits in a router because no worker takes it; sent while anything does, and once after.

    Without it the planner would not know of demand that has reached no worker.
    """

    router_id: str
    requests_waiting: int
    waiting_tokens: int = Field(description="prompts, and outputs of those that are replayed")


# --- membership: each process's lease in the members bucket --------------------------------------


class WorkerState(StrEnum):
    """Life of a worker, as its lease shows it."""

    STARTING = "starting"
    READY = "ready"
    RELOADING = "reloading"  # its group broke: it gets missing layers back and serves nothing
    DRAINING = "draining"


class ModelCosts(WireModel):
    """What the layers of the model cost on one worker; seconds are of a typical batch.

    A whole replica may weigh less than the sum of its parts: with tied weights the LM head is the
    embedding, and only a pipeline holds it twice.
    """

    layer_weight_bytes: int
    embedding_weight_bytes: int
    head_weight_bytes: int
    whole_weight_bytes: int = Field(description="what a replica holds")
    kv_layer_block_bytes: int = Field(description="one block of one layer")
    chunk_bytes: int = Field(default=1, ge=1, description="each layer's KV is so many times this")
    layer_seconds: float = Field(default=0.0, description="0: not measured")
    embedding_seconds: float = 0.0
    head_seconds: float = Field(default=0.0, description="final norm, LM head and sampling")


class WorkerInfo(Message):
    """What a worker is and holds; renewed as its lease in the members bucket."""

    worker_id: str
    incarnation: str = Field(description="fresh for every process, so a restart is noticed")
    host: str
    pid: int
    state: WorkerState
    model_id: str
    num_layers: int
    max_model_len: int
    device: str
    dtype: str
    block_size: int
    kv_block_bytes: int = Field(description="bytes of one block over all the layers held")
    memory_bytes: int
    weight_bytes: int
    kv_bytes: int
    free_bytes: int
    layers: tuple[Span, ...] = Field(description="layers whose weights are resident")
    costs: ModelCosts | None = Field(default=None, description="None: all layers alike, no ends")
    applied_epoch: int = 0
    started_at: float


class RouterInfo(Message):
    """A router's lease; a worker frees what it runs for a router whose lease is gone."""

    router_id: str
    host: str
    pid: int
    url: str
    started_at: float


class PlannerInfo(Message):
    """A planner's lease."""

    planner_id: str
    host: str
    pid: int
    started_at: float


class LeaderLease(Message):
    """Who leads; `term` only rises: the second it took the lead, or one more than any before."""

    planner_id: str
    term: int


# --- plans: planner -> workers, and their answers -------------------------------------------------


class AckState(StrEnum):
    """What a worker did with a plan.

    Said again for every newer version that has the same groups, and FAILED for as long as the plan
    names a group that the worker cannot serve any more.
    """

    PREPARED = "prepared"
    APPLIED = "applied"
    SETTLED = "settled"  # applied, and no request is left on the layout before
    REFUSED = "refused"
    FAILED = "failed"


class PlanAck(Message):
    """A worker's answer to the plan of (term, epoch)."""

    worker_id: str
    term: int
    epoch: int
    state: AckState
    detail: str = ""


class AdminAction(StrEnum):
    """What an operator may ask of the leading planner."""

    DRAIN = "drain"
    DROP = "drop"
    RESTORE = "restore"


class AdminRequest(Message):
    """An operator's wish, passed on by a router. Without `workers` it means the whole cluster.

    A drop holds until a restore, or for `hold_seconds`; a restore holds for `hold_seconds`.
    """

    action: AdminAction
    workers: tuple[str, ...] = ()
    dry_run: bool = False
    hold_seconds: float | None = Field(default=None, ge=0.0)


class AdminReply(Message):
    """The leading planner's answer; `error` is empty where the wish is granted.

    `plan` is what a drop or a restore leads to; with `dry_run` it is only shown.
    """

    error: str = ""
    detail: str = ""
    plan: Plan | None = None
