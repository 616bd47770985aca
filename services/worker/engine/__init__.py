"""Requests, scheduler, block manager: the pure decisions of a worker's engine.

Nothing here does I/O, reads a clock or imports torch; time is an argument. The engine thread calls
`Scheduler.schedule`, runs the batch, and hands the sampled tokens to `update_from_output`.
"""
