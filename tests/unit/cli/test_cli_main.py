"""The command line itself: help, versions, mistakes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from services import cli


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_help_and_version_end_well(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 0
    assert "kunserve" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"kunserve {name}" in text
    assert "examples:" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "command"),
        (["serve"], "serve"),
        (["up", "--no-such-option"], "--no-such-option"),
        (["up", "--port", "http"], "--port"),
        (["up", "--port", "70000"], "--port"),
        (["up", "--device-memory", "much"], "--device-memory"),
        (["up", "--workers", "0"], "--workers"),
        (["up", "--config", "/nowhere/kunserve.toml"], "/nowhere/kunserve.toml"),
        (["up", "--port", "0", "--model", "/nowhere/model"], "/nowhere/model"),
        (["router", "--port", "x"], "--port"),
        (["worker", "--worker-id", "a b"], "worker id"),
        (["health", "database"], "database"),
        (["health", "worker"], "--admin-port"),
        (["status", "--url", "localhost"], "localhost"),
    ],
)
def test_bad_configuration_is_one_sentence_and_exit_code_2(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert expected in captured.err


@pytest.mark.parametrize("words", [["status"], ["drain", "w"], ["health", "router"], ["bench"]])
def test_a_cluster_that_is_not_there_is_one_sentence_and_exit_code_1(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = "http://127.0.0.1:9"  # the discard port: nothing listens there
    assert cli.main([*words, "--url", nobody]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unexpected_exception_is_one_line_that_says_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode() -> cli.Program[object]:
        raise ZeroDivisionError("boom")

    monkeypatch.setitem(cli.COMMANDS, "up", cli.Command("", explode))
    assert cli.main(["up"]) == 1
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert "ZeroDivisionError" in complaint
    assert "test_cli_main.py" in complaint
    assert cli.main(["up", "--log-level", "debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_help_and_services_without_a_model_need_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None; from services import cli;"
        " [cli.COMMANDS[name].load() for name in ('up', 'router', 'planner', 'status', 'doctor')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_overview_imports_no_service() -> None:
    program = (
        "import sys; from services import cli; assert not"
        " {'pydantic', 'aiohttp', 'nats', 'structlog'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
