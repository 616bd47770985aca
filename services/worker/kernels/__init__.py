"""The CPU compute library: C compiled at first use, bound to torch tensors (see cpu.py)."""
