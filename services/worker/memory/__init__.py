"""A worker's memory budget: chunks that belong to weights or to KV, mapped where they are needed.

`MemoryPool` is what the worker uses; `PhysicalMemory` is the seam between it and the device.
"""
