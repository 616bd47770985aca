"""How messages become bytes: pydantic models, msgpack, a version, unknown fields ignored.

`Message` is the base of everything that travels on the bus or rests in a key-value bucket. Models
are frozen; a reader of an older release ignores fields it does not know.
"""

from __future__ import annotations

from typing import Self

import msgpack
from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import KunserveError

MESSAGE_VERSION = 1


class MessageError(KunserveError):
    """Bytes on the bus that are not the message they should be."""


class WireModel(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Message(WireModel):
    """A whole message."""

    v: int = MESSAGE_VERSION

    def encode(self) -> bytes:
        """Serialise to msgpack."""
        packed: bytes = msgpack.packb(self.model_dump(mode="python"), use_bin_type=True)
        return packed

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """Parse and validate; raises MessageError naming the message and what is wrong with it."""
        try:
            return cls.model_validate(unpack(payload, cls.__name__))
        except ValidationError as error:
            raise MessageError(f"malformed {cls.__name__}: {first_problem(error)}") from error


def unpack(payload: bytes, name: str) -> object:
    """Parse msgpack; raises MessageError naming the message `name`."""
    try:
        fields: object = msgpack.unpackb(payload, raw=False, strict_map_key=False)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise MessageError(f"malformed {name}: not msgpack ({error})") from error
    return fields


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's findings as one phrase: where, and what."""
    finding = error.errors()[0]
    where = ".".join(str(part) for part in finding["loc"])
    return f"{where}: {finding['msg']}" if where else finding["msg"]
