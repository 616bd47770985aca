"""Settings of `kunserve up` and what reaches its children."""

from __future__ import annotations

import pytest

from services.cluster.settings import (
    SERVICES,
    LocalClusterSettings,
    UpSettings,
    child_environment,
    threads_per_worker,
)
from shared.errors import ConfigError
from shared.settings import load_settings

DIFFERENT_ON_PURPOSE = {"nats", "threads", "drain_timeout_seconds"}


def given_settings(environment: dict[str, str] | None = None, **given: str) -> LocalClusterSettings:
    return load_settings(UpSettings, given, environment or {})


def test_every_option_of_a_service_that_does_not_differ_per_child_can_be_given_to_up() -> None:
    per_child = {"worker_id", "router_id", "planner_id", "admin_host", "admin_port"}
    offered = set(UpSettings.model_fields)
    for service in SERVICES.values():
        assert set(service.model_fields) - per_child <= offered
    assert not per_child & offered


def test_defaults_are_the_services_own() -> None:
    for service in SERVICES.values():
        for name, field in service.model_fields.items():
            if name in UpSettings.model_fields and name not in DIFFERENT_ON_PURPOSE:
                ours = UpSettings.model_fields[name]
                assert ours.get_default(call_default_factory=True) == field.get_default(
                    call_default_factory=True
                )


@pytest.mark.parametrize("service", SERVICES)
def test_a_child_can_load_what_it_is_given(service: str) -> None:
    settings = given_settings(
        device_memory="512MiB", max_queued_requests="7", lease_ttl_seconds="3", log_format="json"
    )
    environment = child_environment(service, settings, {"nats": "nats://127.0.0.1:1"}, {})
    loaded = load_settings(SERVICES[service], {}, environment).model_dump()
    assert loaded["nats"] == "nats://127.0.0.1:1"
    assert loaded["lease_ttl_seconds"] == 3.0
    assert loaded["log_format"] == "json"
    assert loaded.get("device_memory", 512 * 1024**2) == 512 * 1024**2
    assert loaded.get("max_queued_requests", 7) == 7


def test_what_was_not_given_is_left_to_the_child() -> None:
    environment = child_environment("worker", given_settings(), {}, {"HOME": "/h"})
    assert {name for name in environment if name.startswith("KUNSERVE_")} == set()
    assert environment["HOME"] == "/h"


def test_settings_of_up_do_not_leak_into_children_that_have_their_own() -> None:
    outer = {"KUNSERVE_WORKER_ID": "mine", "KUNSERVE_ADMIN_PORT": "9", "KUNSERVE_NATS_FILE": "/n"}
    environment = child_environment("worker", given_settings(), {"nats": "nats://a"}, outer)
    assert "KUNSERVE_WORKER_ID" not in environment
    assert "KUNSERVE_ADMIN_PORT" not in environment
    assert "KUNSERVE_NATS_FILE" not in environment
    assert environment["KUNSERVE_NATS"] == "nats://a"


def test_variables_that_are_no_settings_are_inherited() -> None:
    outer = {"KUNSERVE_CC": "gcc", "KUNSERVE_NATS_SERVER_BIN": "/bin/nats"}
    environment = child_environment("worker", given_settings(), {}, outer)
    assert environment["KUNSERVE_CC"] == "gcc"
    assert environment["KUNSERVE_NATS_SERVER_BIN"] == "/bin/nats"


def test_a_secret_reaches_the_child_that_needs_it_and_no_other() -> None:
    settings = given_settings({"KUNSERVE_API_KEY": "sesame"})
    assert child_environment("router", settings, {}, {})["KUNSERVE_API_KEY"] == "sesame"
    assert "sesame" not in child_environment("worker", settings, {}, {}).values()


def test_a_bad_value_for_a_service_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="--max-num-seqs"):
        given_settings(max_num_seqs="many")


def test_cores_are_shared_and_nobody_goes_without() -> None:
    assert threads_per_worker(given_settings(workers="256")) == 1
    assert threads_per_worker(given_settings(threads="5")) == 5
