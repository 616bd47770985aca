"""The only door to transformers' configurations; it imports slowly, so only when needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shared.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def transformers_config(raw: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """What transformers makes of a config.json, with its defaults for what is not there.

    Raises:
        ConfigError: transformers does not know it or refuses a field.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**raw)
    except Exception as error:  # its checks raise errors of many kinds
        raise ConfigError(f"{where}: transformers refuses this configuration: {error}") from error
