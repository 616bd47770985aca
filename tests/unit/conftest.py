"""No property test fails because the machine is busy."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("kunserve", deadline=None)
settings.load_profile("kunserve")
