"""Bad input to the `kunserve` command: one sentence, exit code 2, no traceback, no hang."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.processes import free_port
from shared.embedded_nats import EmbeddedNats
from tests.integration.harness import run_command

#: How long a command may take to find out that it cannot work: a model is loaded by then.
REFUSAL_TIMEOUT_SECONDS = 90.0
AUTHORIZATION = 'authorization { user: "router", password: "sesame" }'


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def refusal(*arguments: str, environment: dict[str, str] | None = None) -> str:
    """The sentence with which a command refuses its configuration."""
    exit_code, output, errors = await run_command(
        *arguments,
        environment={"KUNSERVE_PORT": "0", **(environment or {})},
        timeout_seconds=REFUSAL_TIMEOUT_SECONDS,
    )
    assert exit_code == 2, errors
    assert output == ""
    assert "Traceback" not in errors
    *_, sentence = errors.splitlines()
    prefix = f"kunserve {arguments[0]}: "
    assert sentence.startswith(prefix)
    return sentence.removeprefix(prefix)


async def test_a_taken_port_is_seen_before_anything_is_started(taken_port: int) -> None:
    sentence = await refusal("up", "--port", str(taken_port))
    assert str(taken_port) in sentence
    assert "in use" in sentence


async def test_an_address_of_another_machine() -> None:
    assert "192.0.2.1" in await refusal("up", "--host", "192.0.2.1")


async def test_nats_that_nobody_answers() -> None:
    where = f"127.0.0.1:{free_port()}"
    services = ("up", "router", "planner", "worker")
    for sentence in await asyncio.gather(
        *(refusal(service, "--nats", f"nats://{where}") for service in services)
    ):
        assert where in sentence


@pytest.mark.parametrize("service", ["up", "planner"])
async def test_wrong_nats_credentials(service: str) -> None:
    async with EmbeddedNats(extra_config=AUTHORIZATION) as server:
        url = server.url.replace("nats://", "nats://router:wrong@")
        sentence = await refusal(service, "--nats", url)
    assert "credentials" in sentence
    assert "wrong" not in sentence  # a password is not for logs


async def test_a_nats_binary_that_is_not_there() -> None:
    sentence = await refusal("up", environment={"KUNSERVE_NATS_SERVER_BIN": "/nowhere/nats"})
    assert "/nowhere/nats" in sentence


async def test_a_memory_that_does_not_hold_the_weights_says_how_much_would() -> None:
    sentence = await refusal("up", "--workers", "1", "--device-memory", "64MiB")
    assert "MiB" in sentence
    assert "internal error" not in sentence


async def test_a_model_directory_that_does_not_exist(tmp_path: Path) -> None:
    missing = tmp_path / "no-model"
    assert str(missing) in await refusal("up", "--model", str(missing))


async def test_a_directory_without_a_model(tmp_path: Path) -> None:
    assert str(tmp_path) in await refusal("up", "--model", str(tmp_path))


async def test_a_corrupt_gguf_file(tmp_path: Path) -> None:
    corrupt = tmp_path / "model.gguf"
    corrupt.write_bytes(b"GGUF" + b"\xff" * 100)
    assert "model.gguf" in await refusal("up", "--model", str(corrupt))


async def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert str(file) in await refusal("up", "--cache-dir", str(file))


async def test_a_settings_file_with_an_unknown_key(tmp_path: Path) -> None:
    config = tmp_path / "kunserve.toml"
    config.write_text("wokers = 3\n")
    sentence = await refusal("up", "--config", str(config))
    assert "wokers" in sentence
    assert str(config) in sentence


async def test_a_secret_that_is_not_in_its_file(tmp_path: Path) -> None:
    environment = {"KUNSERVE_API_KEY_FILE": str(tmp_path / "key")}
    assert "KUNSERVE_API_KEY_FILE" in await refusal("up", environment=environment)


async def test_the_doctor_finds_this_machine_fit_for_the_tests(tmp_path: Path) -> None:
    exit_code, output, errors = await run_command("doctor", "--cache-dir", str(tmp_path))
    assert exit_code == 0, output + errors
    assert "nats-server" in output


async def test_the_doctor_names_what_is_missing(tmp_path: Path) -> None:
    exit_code, output, _ = await run_command(
        "doctor", "--nats", f"nats://127.0.0.1:{free_port()}", "--cache-dir", str(tmp_path)
    )
    assert exit_code == 1
    assert "FAILED" in output


async def test_status_of_a_server_that_is_no_router(taken_port: int) -> None:
    url = f"http://127.0.0.1:{taken_port}"
    exit_code, _, errors = await run_command("status", "--url", url, "--timeout-seconds", "0.5")
    assert exit_code == 1
    assert errors.count("\n") == 1
