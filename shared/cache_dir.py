"""Where converted models and compiled kernels are kept unless `--cache-dir` says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shared.errors import ConfigError


def default_cache_dir(environment: Mapping[str, str]) -> Path:
    """`$XDG_CACHE_HOME/kunserve`, else `~/.cache/kunserve` (XDG Base Directory Specification).

    Raises ConfigError where neither is known, as for a user without a home.
    """
    base = environment.get("XDG_CACHE_HOME", "")
    if Path(base).is_absolute():  # the specification ignores relative paths
        return Path(base) / "kunserve"
    try:
        return Path.home() / ".cache" / "kunserve"
    except RuntimeError as error:
        raise ConfigError("this user has no home directory; give --cache-dir") from error
