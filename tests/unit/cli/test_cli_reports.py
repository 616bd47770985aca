"""What commands print: tables, the greeting, the doctor's judgement."""

from __future__ import annotations

import json

import pytest

from services.cluster.checks import Finding
from services.cluster.doctor import check_cpu, check_memory, judge_nats
from services.cluster.gpu_checks import judge_probes
from services.cluster.greeting import greeting
from services.cluster.health import HealthSettings, health_url
from services.cluster.http import Answer
from services.cluster.status import render_cluster
from services.cluster.table import render_bytes, render_table
from services.cluster.up import base_url

CLUSTER = {
    "epoch": 3,
    "term": 1,
    "state": "stable",
    "groups": [
        {
            "id": "g0",
            "leader": "worker-0",
            "members": [
                {"worker": "worker-0", "layers": [0, 15]},
                {"worker": "worker-1", "layers": [15, 30]},
            ],
            "requests_running": 4,
            "requests_waiting": 1,
            "kv_blocks_used": 50,
            "kv_blocks_waiting": 70,
            "kv_blocks_total": 200,
        }
    ],
    "workers": [
        {
            "id": "worker-0",
            "layers": [[0, 15]],
            "device": "cpu",
            "memory_bytes": 1024**3,
            "weight_bytes": 512 * 1024**2,
            "kv_bytes": 400 * 1024**2,
            "free_bytes": 0,
            "state": "ready",
        }
    ],
    "decision": None,
    "transitions": [],
}
NOW = 1000.0


def test_a_table_is_as_wide_as_its_widest_cells() -> None:
    assert render_table(("A", "B"), [("long", "1"), ("x", "22")]) == (
        "A     B\nlong  1\nx     22\n"
    )


def test_sizes_are_read_at_a_glance() -> None:
    assert [render_bytes(size) for size in (0, 1023, 1536, 5 * 1024**4)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 TiB",
    ]


def test_the_status_shows_layout_load_and_memory() -> None:
    text = render_cluster(CLUSTER, NOW)
    assert "layout stable, term 1, epoch 3" in text
    assert "worker-0 [0, 15) > worker-1 [15, 30)" in text
    assert "50/200 (25%) + 70 queued" in text
    assert "512.0 MiB" in text


def test_a_cluster_without_workers_can_be_shown() -> None:
    assert "WORKER" in render_cluster(CLUSTER | {"groups": [], "workers": []}, NOW)


def test_the_status_tells_what_the_planner_did_and_why() -> None:
    dropped = {
        "term": 1,
        "epoch": 2,
        "state": "dropping",
        "cause": "demand 190 of 200 blocks",
        "started_at": NOW - 30,
        "phase_seconds": {"prepare": 0.25, "commit": 0.004, "exchange": 1.5},
        "result": "applied",
    }
    decision = {
        "action": "hold",
        "rule": "too_soon",
        "detail": "5 s left",
        "figures": {},
        "decided_at": NOW - 600,
    }
    transitions = [dropped | {"started_at": NOW - 3 * 86400.0}, dropped]
    text = render_cluster(CLUSTER | {"decision": decision, "transitions": transitions}, NOW)
    assert "planner hold, too soon, 10 min ago: 5 s left" in text
    newest, oldest = text.splitlines()[-2:]
    assert newest.split("  ") == [
        "30 s",
        "dropping",
        "prepare 0.25 s, commit 0.004 s, exchange 1.5 s",
        "applied",
        "demand 190 of 200 blocks",
    ]
    assert oldest.startswith("3 d")


def test_the_greeting_holds_a_request_that_can_be_pasted() -> None:
    text = greeting("http://127.0.0.1:8000", {"data": [{"id": "smollm2"}]}, workers=2)
    body = json.loads(text[text.index("'{") + 1 : text.index("}'") + 1])
    assert body["model"] == "smollm2"
    assert "http://127.0.0.1:8000/v1/chat/completions" in text


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("example.org", "http://example.org:80"),
    ],
)
def test_the_url_shown_is_one_that_a_client_here_can_use(host: str, expected: str) -> None:
    assert base_url(host, 80) == expected


def test_health_asks_the_service_where_its_own_settings_say_it_is() -> None:
    assert health_url("router", HealthSettings(port=81)) == "http://127.0.0.1:81/health"
    assert health_url("worker", HealthSettings(admin_port=9)) == "http://127.0.0.1:9/ready"
    assert health_url("planner", HealthSettings(url="http://p:9/")) == "http://p:9/ready"


def test_a_problem_is_told_in_the_services_own_words() -> None:
    assert Answer(503, {"error": {"message": "no worker"}}).problem == "no worker"
    assert Answer(503, {"reasons": ["NATS is down", "no plan"]}).problem == "NATS is down; no plan"
    assert Answer(502, None).problem == "HTTP status 502"


def findings(info: dict[str, object]) -> dict[str, Finding]:
    return {check.subject: check.finding for check in judge_nats(info)}


def test_the_doctor_accepts_a_nats_server_that_fits() -> None:
    info = {"version": "2.11.0-RC.1", "jetstream": True, "max_payload": 1048576}
    assert set(findings(info).values()) == {Finding.OK}


def test_the_doctor_names_what_a_nats_server_lacks() -> None:
    found = findings({"version": "2.9.10", "max_payload": 65536})
    assert found == {
        "NATS": Finding.FAILED,
        "JetStream": Finding.FAILED,
        "max_payload": Finding.WARNING,
    }


def test_the_doctor_warns_of_too_little_memory() -> None:
    meminfo = "MemTotal: 8000000 kB\nMemAvailable:    1048576 kB\n"
    assert [check.finding for check in check_memory(meminfo, 1024**3)] == [Finding.OK]
    assert [check.finding for check in check_memory(meminfo, 2 * 1024**3)] == [Finding.WARNING]


def test_the_doctor_reads_vector_units_of_either_family() -> None:
    (check,) = check_cpu("processor: 0\nflags\t\t: fpu avx2 fma avx512f\n")
    assert "avx2 fma avx512f" in check.detail
    (check,) = check_cpu("Features: fp asimd\n")
    assert "no wide vectors" in check.detail


def probe(subject: str, is_ok: bool) -> dict[str, object]:
    return {"subject": subject, "is_ok": is_ok, "detail": "as seen"}


def test_the_doctor_warns_of_what_a_gpu_cannot_do_and_says_what_is_used() -> None:
    probes = [probe("GPU software", True), probe("GPU memory mapping", True), probe("NCCL", False)]
    checks = list(judge_probes(probes))
    findings = [Finding.OK, Finding.OK, Finding.WARNING, Finding.OK]
    assert [check.finding for check in checks] == findings
    assert checks[-1].detail.startswith("the GPU in bfloat16")


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        ([], "by CUDA IPC between workers of this host, by NCCL between hosts"),
        (["NCCL"], "by CUDA IPC between workers of this host, by host memory between hosts"),
        (["CUDA IPC words"], "by NCCL between workers of this host, by NCCL between hosts"),
        (
            ["CUDA IPC memory", "NCCL"],
            "by host memory between workers of this host, by host memory between hosts",
        ),
    ],
)
def test_the_doctor_says_how_tensors_will_travel(failing: list[str], expected: str) -> None:
    subjects = ["GPU software", "CUDA IPC memory", "CUDA IPC words", "NCCL"]
    checks = list(judge_probes([probe(each, each not in failing) for each in subjects]))
    assert checks[-1].detail == f"the GPU in bfloat16; tensors travel {expected}"


def test_the_doctor_fails_a_gpu_that_workers_would_use_but_cannot_map() -> None:
    usable, unmappable = probe("GPU software", True), probe("GPU memory mapping", False)
    assert [check.finding for check in judge_probes([usable, unmappable])][1] is Finding.FAILED


def test_the_doctor_lets_workers_use_the_cpu_beside_a_gpu_that_torch_cannot_use() -> None:
    probes = [probe("GPU software", False), probe("GPU memory mapping", False)]
    checks = list(judge_probes(probes))
    assert Finding.FAILED not in [check.finding for check in checks]
    assert checks[-1].detail.startswith("the CPU in float32")
