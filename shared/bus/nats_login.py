"""Where a NATS server is and how to log in there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from shared.errors import ConfigError

NKEY_SEED_LENGTH = 58


@dataclass(frozen=True, slots=True)
class Credentials:
    """How to log in beyond user and password in the URL: a NATS credentials file, or an nkey."""

    creds_file: Path | None = None
    nkey_file: Path | None = None

    def check(self) -> None:
        """Raise ConfigError where the files cannot be used."""
        if self.creds_file is not None and self.nkey_file is not None:
            raise ConfigError("give either --nats-creds or --nats-nkey, not both")
        for option, path in (("--nats-creds", self.creds_file), ("--nats-nkey", self.nkey_file)):
            if path is None:
                continue
            try:
                content = path.read_bytes()
            except OSError as error:
                raise ConfigError(f"{option}: cannot read {path}: {error.strerror}") from error
            if not _has_seed(content):
                raise ConfigError(f"{option}: {path} holds no NATS user seed")


def parse_url(url: str) -> SplitResult:
    """Check the URL of a NATS server; raises ConfigError (that does not repeat a password)."""
    try:
        parts = urlsplit(url if "://" in url else f"nats://{url}")
        usable = parts.scheme in ("nats", "tls") and bool(parts.hostname)
        usable = usable and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError("the NATS URL must look like nats://host:4222 or tls://host:4222")
    return parts


def _has_seed(content: bytes) -> bool:
    return any(
        line.startswith(b"SU") and len(line) == NKEY_SEED_LENGTH
        for line in (line.strip() for line in content.splitlines())
    )


def login_options(url: SplitResult, credentials: Credentials) -> dict[str, Any]:
    """nats-py's options for logging in. Files win over what the URL says."""
    if credentials.creds_file is not None:
        return {"user_credentials": str(credentials.creds_file)}
    if credentials.nkey_file is not None:
        return {"nkeys_seed": str(credentials.nkey_file)}
    if url.username and url.password is None:
        return {"token": unquote(url.username)}
    if url.username:
        return {"user": unquote(url.username), "password": unquote(url.password or "")}
    return {}
