"""Typed values out of a config.json; errors name the file, the field and what would be right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shared.errors import ConfigError

_SUPPORTED_ACTIVATION = "silu"


class Fields:
    """The fields of one config.json, or of a part of it; `where` names it in errors."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def error(self, name: str, problem: str) -> ConfigError:
        value = self.raw.get(name)
        shown = f"{name} = {value!r}" if name in self.raw else f"{name}, which is missing,"
        return ConfigError(f"{self.where}: {shown} {problem}")

    def count(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, "must be a positive whole number")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(name, "must be a positive number")
        if not math.isfinite(value) or value <= 0:
            raise self.error(name, "must be a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return bool(value)

    def activation(self) -> str:
        value = self.raw.get("hidden_act", _SUPPORTED_ACTIVATION)
        if value != _SUPPORTED_ACTIVATION:
            raise self.error("hidden_act", f"is not supported; {_SUPPORTED_ACTIVATION} is")
        return _SUPPORTED_ACTIVATION
