"""On a slow link KV that travels leaves room for those who go on: read off the frames' order."""

from __future__ import annotations

from services.worker.engine.request import Request
from services.worker.kernels.cpu import CpuKernels
from services.worker.links.base import Link, LinkFrame
from services.worker.pipeline.messages import FrameKind
from tests.tiny_models import VOCAB_SIZE, TinyModels
from tests.unit.model.model_helpers import random_tokens
from tests.unit.model.request_helpers import make_request
from tests.unit.pipeline.pipeline_engine import Engine, undisturbed
from tests.unit.pipeline.pipeline_helpers import add, expect, open_cluster

LINK_BYTES_PER_SECOND = 10e6


def record_arrivals(engine: Engine) -> list[FrameKind]:
    """The kinds of frames that come to an engine from now on, as they come."""
    arrivals: list[FrameKind] = []
    take = engine.on_frame

    def on_frame(link: Link, frame: LinkFrame) -> None:
        arrivals.append(FrameKind(frame.kind))
        take(link, frame)

    engine.on_frame = on_frame  # type: ignore[method-assign]
    return arrivals


def during_exchange(arrivals: list[FrameKind], kind: FrameKind) -> int:
    """How many frames of a kind came after the first and before the last part of KV."""
    parts = [at for at, each in enumerate(arrivals) if each is FrameKind.KV_PART]
    return arrivals[parts[0] : parts[-1]].count(kind)


def test_activations_and_tokens_flow_between_parts_of_kv(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    """Those who have little KV run on the pipeline while much of the others' is on its way."""
    directory = tiny_models.directory("llama")

    def requests(home: int) -> list[Request]:
        lengths = [8, *[90] * 13]
        return [
            make_request(
                f"r{home}-{index}",
                random_tokens(length, home + index, VOCAB_SIZE),
                max_tokens=25,
                ignore_eos=True,
            )
            for index, length in enumerate(lengths)
        ]

    expected = undisturbed(directory, kernels, [*requests(0), *requests(1)])
    bandwidth = LINK_BYTES_PER_SECOND
    with open_cluster(directory, kernels, bandwidth=bandwidth, num_tokens=128) as cluster:
        leader, follower = cluster.engines
        to_leader, to_follower = record_arrivals(leader), record_arrivals(follower)
        for home in (0, 1):
            add(cluster, requests(home), at=home)
        cluster.run(lambda: all(cluster.tokens(f"r{home}-13") for home in (0, 1)))
        cluster.change(range(2))
        cluster.run()
        expect(cluster, expected)
        cluster.check()
    assert during_exchange(to_follower, FrameKind.MICROBATCH) >= 3
    assert during_exchange(to_leader, FrameKind.TOKENS) >= 3
