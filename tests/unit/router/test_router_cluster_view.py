"""What `GET /cluster` tells, and that `/openapi.json` describes it."""

from __future__ import annotations

from services.router.api.openapi import openapi_document
from services.router.cluster_view import ClusterView, cluster_view
from services.router.fleet import Fleet
from shared.layout import DecisionNote, LayoutState, Transition, TransitionLog


def test_before_the_first_plan_there_is_nothing_to_show() -> None:
    view = cluster_view(Fleet("router"))
    assert (view.epoch, view.groups, view.workers, view.decision) == (0, [], [], None)


def test_the_planners_last_decision_and_the_last_transitions_are_shown() -> None:
    fleet = Fleet("router")
    note = DecisionNote(
        action="hold",
        rule="too_soon",
        detail="9 s left",
        figures={"demand_blocks": 190.0},
        decided_at=5.0,
    )
    transitions = [
        Transition(term=1, epoch=n, state=LayoutState.DROPPING, cause=f"{n}", started_at=float(n))
        for n in range(25)
    ]
    fleet.transitions = TransitionLog(transitions=tuple(transitions), decision=note)
    answer = cluster_view(fleet).model_dump(mode="json")
    assert answer["decision"] == note.model_dump(mode="json")
    assert [shown["epoch"] for shown in answer["transitions"]] == list(range(5, 25))


def test_the_openapi_document_describes_the_answer() -> None:
    document = openapi_document()
    schema = document["components"]["schemas"]["ClusterView"]
    assert schema["properties"].keys() == ClusterView.model_fields.keys()
    content = document["paths"]["/cluster"]["get"]["responses"]["200"]["content"]
    assert content["application/json"]["schema"]["$ref"].endswith("/ClusterView")
