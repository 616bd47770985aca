"""Attention over paged KV behind one interface (base.py)."""
