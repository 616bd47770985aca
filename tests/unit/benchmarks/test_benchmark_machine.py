"""Parsing of /proc."""

from __future__ import annotations

import pytest

from benchmarks.machine import busy_share, parse_cpuinfo
from benchmarks.processes import parse_stat


def test_cpuinfo_of_the_first_processor() -> None:
    text = "processor : 0\nmodel name : EPYC: a\nflags : fpu avx2\n\nprocessor : 1\nflags : fpu\n"
    assert parse_cpuinfo(text)["model name"] == "EPYC: a"
    assert parse_cpuinfo(text)["processor"] == "0"


def test_busy_share_leaves_out_idle_and_disk_waits() -> None:
    before = [10, 0, 10, 100, 10, 0, 0, 0]
    after = [30, 0, 10, 150, 40, 0, 0, 0]
    assert busy_share(before, after) == pytest.approx(0.2)
    assert busy_share(before, before) == 0.0


def test_stat_of_a_process_with_a_strange_name() -> None:
    fields = ["S", "17", "18", "19", *["0"] * 7, "30", "12", *["0"] * 6, "777", "0"]
    stat = parse_stat(f"42 (a) b (c) {' '.join(fields)}")
    assert (stat.parent_pid, stat.session_id, stat.start_ticks) == (17, 19, 777)
    assert stat.cpu_ticks == 42
    assert not stat.is_zombie
