"""Settings: one pydantic model per service, filled from command line, environment, file, defaults.

Precedence is that order, per field. A field `device_memory` is `--device-memory` on the command
line, `KUNSERVE_DEVICE_MEMORY` in the environment (or `KUNSERVE_DEVICE_MEMORY_FILE`, a path whose
content is the value, for secrets) and `device_memory` in a TOML file given by `--config`. A file
with a key that no field has is refused; an environment may hold variables of other services.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import PydanticUndefined

from shared.errors import ConfigError
from shared.wire import first_problem

ENV_PREFIX = "KUNSERVE_"

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}iB"] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[_letter] = 1024**_power


def parse_bytes(value: object) -> object:
    """Turn `"1.5GiB"`, `"300MB"` or `"4096"` into a number of bytes; other types pass unchanged."""
    if not isinstance(value, str):
        return value
    number = value.strip().rstrip("KMGTiBkmgtb")
    unit = value.strip()[len(number) :]
    scale = {known.lower(): factor for known, factor in _UNITS.items()}.get(unit.strip().lower())
    try:
        amount = float(number)
    except ValueError:
        amount = -1.0
    if scale is None or not 0 <= amount < 2**60:
        raise ValueError(f"{value!r} is no size; write for example 512MiB or 1GiB")
    return int(amount * scale)


ByteSize = Annotated[int, BeforeValidator(parse_bytes)]


class Settings(BaseModel):
    """Base of every service's settings. Frozen: built once, never mutated."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SettingsType = TypeVar("SettingsType", bound=Settings)


def add_arguments(parser: argparse.ArgumentParser, settings: type[Settings]) -> None:
    """Give `parser` one option per field, with the field's description and default as help."""
    for name, field in settings.model_fields.items():
        has_default = field.default not in (None, PydanticUndefined)
        default = f" (default {field.default})" if has_default else ""
        help_text = ((field.description or "") + default).replace("%", "%%")
        flag = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=help_text
            )
        else:
            metavar = name.rsplit("_", maxsplit=1)[-1].upper()
            parser.add_argument(flag, default=None, metavar=metavar, help=help_text)


def load_settings(
    settings: type[SettingsType],
    arguments: Mapping[str, object],
    environment: Mapping[str, str],
    config_file: Path | None = None,
) -> SettingsType:
    """Merge the sources and validate.

    Args:
        arguments: parsed command line; None means "not given".
        environment: usually `os.environ`.

    Raises:
        ConfigError: an unreadable file, an unknown key, a value that does not fit; one sentence.
    """
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    if config_file is not None:
        for key, value in _read_file(config_file, settings).items():
            values[key], origins[key] = value, f"{key} in {config_file}"
    for name in settings.model_fields:
        variable = ENV_PREFIX + name.upper()
        if variable in environment:
            values[name], origins[name] = environment[variable], variable
        elif f"{variable}_FILE" in environment:
            values[name] = _read_secret(Path(environment[f"{variable}_FILE"]), f"{variable}_FILE")
            origins[name] = f"{variable}_FILE"
        if arguments.get(name) is not None:
            values[name], origins[name] = arguments[name], f"--{name.replace('_', '-')}"
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        finding = error.errors()[0]
        name = str(finding["loc"][0]) if finding["loc"] else ""
        where = origins.get(name, f"--{name.replace('_', '-')}" if name else "settings")
        message = finding["msg"].removeprefix("Value error, ") if name else first_problem(error)
        raise ConfigError(f"{where}: {message}") from error


def _read_file(path: Path, settings: type[Settings]) -> dict[str, object]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read settings file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {path} is not valid TOML: {error}") from error
    unknown = sorted(set(content) - set(settings.model_fields))
    if unknown:
        raise ConfigError(f"settings file {path} has the unknown key {unknown[0]!r}")
    return content


def _read_secret(path: Path, variable: str) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{variable}: cannot read {path}: {error}") from error
