"""The one error of this package: a model source that cannot be used."""

from __future__ import annotations

from shared.errors import ConfigError


class ModelSourceError(ConfigError):
    """A model specification, file or cache cannot be used; says what, which file, what to do."""
