"""Which workers can share memory: same kernel, same network namespace, same user."""

from __future__ import annotations

import os
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK_NAMESPACE = Path("/proc/self/ns/net")


def host_id() -> str:
    """A name that is equal for two processes iff one can reach the other's abstract sockets.

    Two containers of one machine usually have network namespaces of their own, hence different
    names. "" where the system does not tell.
    """
    try:
        boot_id = _BOOT_ID.read_text(encoding="ascii").strip()
        namespace = os.readlink(_NETWORK_NAMESPACE)
    except OSError:
        return ""
    return f"{boot_id}/{namespace}/uid:{os.geteuid()}"
