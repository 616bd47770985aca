"""The stable layout: who serves, and that every group holds every layer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.planner.layout_policy import WorkerVerdict, holds_all_layers, settled_layout
from shared.layout import LayoutState, Plan, Span
from shared.messages import WorkerInfo, WorkerState
from tests.planner_support import NUM_LAYERS, worker_info

spans = st.tuples(st.integers(0, NUM_LAYERS - 1), st.integers(1, NUM_LAYERS)).map(
    lambda ends: Span(start=min(ends[0], ends[1] - 1), end=ends[1])
)


@st.composite
def worker_sets(draw: st.DrawFn) -> dict[str, WorkerInfo]:
    ids = draw(st.sets(st.sampled_from("abcdef")))
    return {
        worker_id: worker_info(
            worker_id,
            state=draw(st.sampled_from(WorkerState)),
            model_id=draw(st.sampled_from(["model", "other"])),
            layers=tuple(draw(st.lists(spans, max_size=3))),
        )
        for worker_id in sorted(ids)
    }


@given(workers=worker_sets())
def test_every_layer_has_a_living_owner_in_every_group(
    workers: dict[str, WorkerInfo],
) -> None:
    layout = settled_layout(workers, None)
    if layout is None:
        assert not workers
        return
    for group in layout.groups:
        assert group.tiles(layout.num_layers)
        for layer in range(layout.num_layers):
            owners = [member.worker_id for member in group.members if layer in member.span]
            assert len(owners) == 1
            owner = workers[owners[0]]
            assert owner.state is WorkerState.READY
            assert owner.model_id == layout.model_id
            assert any(layer in span for span in owner.layers)


@given(workers=worker_sets())
def test_every_worker_gets_one_verdict_and_those_who_serve_one_group(
    workers: dict[str, WorkerInfo],
) -> None:
    layout = settled_layout(workers, None)
    if layout is None:
        return
    assert layout.verdicts.keys() == workers.keys()
    serving = sorted(w for w, v in layout.verdicts.items() if v is WorkerVerdict.SERVES)
    assert [group.leader for group in layout.groups] == serving
    assert len({group.group_id for group in layout.groups}) == len(serving)


def test_the_group_of_a_worker_keeps_its_id_when_others_come_and_go() -> None:
    alone = settled_layout({"b": worker_info("b")}, None)
    among = settled_layout({w: worker_info(w) for w in "abc"}, None)
    assert alone is not None
    assert among is not None
    assert alone.groups[0] in among.groups


@pytest.mark.parametrize(
    ("layers", "whole"),
    [
        ((), False),
        ((Span(start=0, end=4),), True),
        ((Span(start=2, end=4), Span(start=0, end=2)), True),
        ((Span(start=0, end=3), Span(start=1, end=4)), True),
        ((Span(start=0, end=1), Span(start=2, end=4)), False),
        ((Span(start=1, end=4),), False),
        ((Span(start=0, end=3),), False),
    ],
)
def test_holding_all_layers(layers: tuple[Span, ...], whole: bool) -> None:
    assert holds_all_layers(worker_info("a", layers=layers)) is whole


def test_the_model_is_kept_while_a_worker_has_it() -> None:
    old, new = worker_info("a", model_id="old"), [worker_info(w, model_id="new") for w in "bc"]
    previous = Plan(
        term=1,
        epoch=1,
        state=LayoutState.STABLE,
        model_id="old",
        num_layers=NUM_LAYERS,
        groups=(),
        created_at=0.0,
    )
    workers = {info.worker_id: info for info in [old, *new]}
    both = settled_layout(workers, previous)
    assert both is not None
    assert both.model_id == "old"
    assert both.verdicts["b"] is WorkerVerdict.OTHER_MODEL
    del workers["a"]
    replaced = settled_layout(workers, previous)
    assert replaced is not None
    assert replaced.model_id == "new"


def test_a_worker_of_another_type_does_not_serve_beside_the_others() -> None:
    infos = [worker_info("a", dtype="bfloat16"), *(worker_info(w) for w in "bc")]
    workers = {info.worker_id: info for info in infos}
    layout = settled_layout(workers, None)
    assert layout is not None
    assert layout.verdicts["a"] is WorkerVerdict.OTHER_FORMAT
    assert [group.leader for group in layout.groups] == ["b", "c"]


def test_workers_that_serve_keep_their_type_however_many_others_join() -> None:
    workers = {"a": worker_info("a", dtype="bfloat16")}
    first = settled_layout(workers, None)
    assert first is not None
    workers |= {w: worker_info(w) for w in "bc"}
    layout = settled_layout(workers, None, first.groups)
    assert layout is not None
    assert [group.leader for group in layout.groups] == ["a"]
