"""Errors that end a process with one sentence instead of a traceback."""

from __future__ import annotations


class KunserveError(Exception):
    """A fault the operator must know about; the command exits with code 1 and prints the text."""


class ConfigError(KunserveError):
    """The given configuration cannot work; the command exits with code 2 and prints the text."""
