"""The message bus: `base.py` says what it does, `nats.py` and `memory.py` do it."""
