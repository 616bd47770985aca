"""One sub-command of `kunserve`: which settings it takes and what it does with them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic

from shared.settings import SettingsType, add_arguments, load_settings


def _none(_: argparse.ArgumentParser) -> None:
    """A command without positional arguments."""


@dataclass(frozen=True, slots=True)
class Program(Generic[SettingsType]):
    """A command. `run` returns the exit code, or raises KunserveError."""

    settings: type[SettingsType]
    run: Callable[[SettingsType, argparse.Namespace], int]
    examples: str
    usage: str = "[OPTIONS]"
    add_positionals: Callable[[argparse.ArgumentParser], None] = _none

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        self.add_positionals(parser)
        add_arguments(parser, self.settings)

    def execute(self, arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
        """Gather the settings and run; raises ConfigError for settings that do not fit."""
        settings = load_settings(self.settings, vars(arguments), environment, arguments.config_file)
        return self.run(settings, arguments)
