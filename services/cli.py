"""The `kunserve` command: finds the sub-command, runs it, turns errors into one sentence.

Each sub-command is imported when it is chosen, so `kunserve --help` answers at once and the router
and the planner run where torch is not installed. Exit codes: 0 clean, 1 fault, 2 bad configuration.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from shared.errors import ConfigError, KunserveError

if TYPE_CHECKING:
    from services.cluster.program import Program

EXIT_FAULT = 1
EXIT_BAD_CONFIGURATION = 2


@dataclass(frozen=True, slots=True)
class Command:
    """A sub-command: one line of help, and how to get at the rest."""

    summary: str
    load: Callable[[], Program[Any]]


def _up() -> Program[Any]:
    from services.cluster.up import UP

    return UP


def _router() -> Program[Any]:
    from services.cluster.program import Program
    from services.router.settings import RouterSettings

    def run(settings: RouterSettings, _: argparse.Namespace) -> int:
        from services.router.service import run as run_router
        from shared.lifecycle import run_service

        return run_service("router", lambda: run_router(settings))

    return Program(RouterSettings, run, "kunserve router --nats nats://nats:4222 --port 8000")


def _planner() -> Program[Any]:
    from services.cluster.program import Program
    from services.planner.settings import PlannerSettings

    def run(settings: PlannerSettings, _: argparse.Namespace) -> int:
        from services.planner.service import run as run_planner
        from shared.lifecycle import run_service

        return run_service("planner", lambda: run_planner(settings))

    return Program(PlannerSettings, run, "kunserve planner --nats nats://nats:4222")


def _worker() -> Program[Any]:
    from services.cluster.program import Program
    from services.worker.settings import WorkerSettings

    def run(settings: WorkerSettings, _: argparse.Namespace) -> int:
        from services.worker.service import run as run_worker
        from shared.lifecycle import run_service

        return run_service("worker", lambda: run_worker(settings))

    return Program(
        WorkerSettings, run, "kunserve worker --nats nats://nats:4222 --device-memory 4GiB"
    )


def _status() -> Program[Any]:
    from services.cluster.status import STATUS

    return STATUS


def _health() -> Program[Any]:
    from services.cluster.health import HEALTH

    return HEALTH


def _drain() -> Program[Any]:
    from services.cluster.drain import DRAIN

    return DRAIN


def _drop() -> Program[Any]:
    from services.cluster.layout_orders import DROP

    return DROP


def _restore() -> Program[Any]:
    from services.cluster.layout_orders import RESTORE

    return RESTORE


def _bench() -> Program[Any]:
    from services.cluster.bench import BENCH

    return BENCH


def _doctor() -> Program[Any]:
    from services.cluster.doctor import DOCTOR

    return DOCTOR


COMMANDS = {
    "up": Command("run a whole cluster on this machine", _up),
    "router": Command("run one router: HTTP in, tokens out", _router),
    "planner": Command("run one planner: decides which worker holds which layers", _planner),
    "worker": Command("run one worker: a device with the model on it", _worker),
    "status": Command("show the layout and the load of a running cluster", _status),
    "health": Command("exit with 0 if a service is healthy, with 1 if not", _health),
    "drop": Command("give replicated layers to the KV cache now", _drop),
    "restore": Command("make whole replicas of pipelines again now", _restore),
    "drain": Command("let a worker finish what it runs and take no more", _drain),
    "bench": Command("put load on a running cluster and measure it", _bench),
    "doctor": Command("check whether this machine can run KunServe", _doctor),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, and no more."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = f"kunserve {words[0]}" if words and words[0] in COMMANDS else "kunserve"
    try:
        return _run(words)
    except ConfigError as error:
        return _complain(name, str(error), EXIT_BAD_CONFIGURATION)
    except KunserveError as error:
        return _complain(name, str(error), EXIT_FAULT)
    except KeyboardInterrupt:
        return _complain(name, "interrupted", EXIT_FAULT)
    except BrokenPipeError:  # whoever read the output has gone; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAULT
    except Exception as error:  # the last resort of a process: report, then end
        if _is_debugging(words):
            traceback.print_exc()
        return _complain(name, _internal_error(error), EXIT_FAULT)


def _run(words: list[str]) -> int:
    if not words or words[0] not in COMMANDS:
        _overview().parse_args(words)
        raise ConfigError("which command? (see kunserve --help)")
    command = COMMANDS[words[0]]
    program = command.load()
    parser = _Parser(
        prog=f"kunserve {words[0]}",
        usage=f"kunserve {words[0]} {program.usage}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog=f"examples:\n  {program.examples}\n\n{_SETTINGS_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", dest="config_file", type=Path, metavar="FILE", help="TOML file with settings"
    )
    program.configure(parser)
    return program.execute(parser.parse_args(words[1:]), os.environ)


_SETTINGS_HELP = """\
Every option can also be given as KUNSERVE_<OPTION> in the environment or, in TOML, in the file of
--config; the command line wins, then the environment, then the file. Exit codes: 0 clean, 1 fault,
2 bad configuration."""


def _overview() -> argparse.ArgumentParser:
    """The parser of `kunserve` without a sub-command: help and version."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(
        f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()
    )
    parser = _Parser(
        prog="kunserve",
        usage="kunserve [--help] [--version] COMMAND [OPTIONS]",
        description="Serves a language model with an OpenAI-compatible API from several workers.",
        epilog=f"commands:\n{listing}\n\nexamples:\n  kunserve up\n  kunserve up --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kunserve {_version()}")
    parser.add_argument("command", choices=list(COMMANDS), help=argparse.SUPPRESS)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("kunserve")
    except importlib.metadata.PackageNotFoundError:
        return "from a source tree that is not installed"


def _is_debugging(words: Sequence[str]) -> bool:
    given = " ".join(words).replace("=", " ")
    return "--log-level debug" in given or os.environ.get("KUNSERVE_LOG_LEVEL") == "debug"


def _internal_error(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
    text = " ".join(str(error).split())
    return (
        f"internal error, {type(error).__name__} in {where}: {text}"
        " (--log-level debug shows how it came there)"
    )


def _complain(name: str, sentence: str, exit_code: int) -> int:
    sys.stderr.write(f"{name}: {sentence}\n")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
