"""Paged attention behind one interface: `base.py` says what it does, `cpu.py` does it."""
