"""A cache entry is complete or absent, whoever builds it, crashes or waits."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from shared.models import ModelSourceError, resolve_model
from shared.models.cache import build_once
from tests.unit.models.tiny_gguf import TinyGguf

DEADLINE_SECONDS = 60.0
CONVERT = """
import resource, sys
from pathlib import Path
from shared.models import ModelSourceError, resolve_model

spec, cache, limit_bytes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
calls = []
if limit_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.readline()
try:
    path = resolve_model(spec, cache, lambda *call: calls.append(call))
except ModelSourceError as error:
    sys.stdout.write(f"refused {error}\\n")
else:
    sys.stdout.write(f"{'built' if calls else 'waited'} {path}\\n")
"""


def start_conversion(
    spec: Path, cache: Path, *, file_limit_bytes: int = 0
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERT, str(spec), str(cache), str(file_limit_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def write_marker(directory: Path) -> None:
    (directory / "marker").write_text("complete")


def unreachable(directory: Path) -> None:
    raise AssertionError(f"built {directory} although another process has the lock")


def test_an_entry_is_built_once(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(directory: Path) -> None:
        built.append(directory)
        write_marker(directory)

    for _ in range(3):
        entry = build_once(tmp_path / "cache" / "e", build, deadline_seconds=1.0)
        assert (entry / "marker").read_text() == "complete"
    assert len(built) == 1


def test_a_failed_build_leaves_no_entry(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").write_text("half")
        raise ModelSourceError("the file is corrupt")

    with pytest.raises(ModelSourceError, match="the file is corrupt"):
        build_once(tmp_path / "e", fail, deadline_seconds=1.0)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    entry = build_once(tmp_path / "e", write_marker, deadline_seconds=1.0)
    assert [file.name for file in entry.iterdir()] == ["marker"]


def test_what_a_killed_builder_left_is_not_used(tmp_path: Path) -> None:
    def crash(directory: Path) -> None:
        (tmp_path / "seen").write_text(str(directory))
        raise ModelSourceError("stop here")

    with pytest.raises(ModelSourceError):
        build_once(tmp_path / "e", crash, deadline_seconds=1.0)
    partial = Path((tmp_path / "seen").read_text())
    partial.mkdir()
    (partial / "half").write_text("half")
    entry = build_once(tmp_path / "e", write_marker, deadline_seconds=1.0)
    assert [file.name for file in entry.iterdir()] == ["marker"]


def test_the_wait_for_another_builder_has_a_deadline(tmp_path: Path) -> None:
    with (tmp_path / ".e.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ModelSourceError, match="another process"):
            build_once(tmp_path / "e", unreachable, deadline_seconds=0.2)


def test_a_cache_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a directory")
    with pytest.raises(ModelSourceError, match="cannot write"):
        build_once(tmp_path / "cache" / "e", write_marker, deadline_seconds=1.0)


def test_two_processes_convert_a_model_once(tmp_path: Path) -> None:
    path = TinyGguf().write(tmp_path / "tiny.gguf")
    processes = [start_conversion(path, tmp_path / "cache") for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=DEADLINE_SECONDS)[0].split() for process in processes]
    assert sorted(answer[0] for answer in answers) == ["built", "waited"]
    assert answers[0][1] == answers[1][1]
    assert (Path(answers[0][1]) / "model.safetensors").is_file()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    path = TinyGguf().write(tmp_path / "tiny.gguf")
    limited = start_conversion(path, tmp_path / "cache", file_limit_bytes=200_000)
    answer, _ = limited.communicate("\n", timeout=DEADLINE_SECONDS)
    assert answer.startswith("refused no room in")
    assert [p for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir()] == []
    assert resolve_model(str(path), tmp_path / "cache", lambda *_: None).is_dir()
