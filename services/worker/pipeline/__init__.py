"""Serving as a pipeline: what the members of a group send each other, and who does what.

leader.py    stage 0: sends batches into the pipeline, orders KV to travel
stage.py     the other stages: compute, hold blocks by key, send and take KV
member.py    one worker's part in groups, in its engine thread: prepare, commit, settle
"""
