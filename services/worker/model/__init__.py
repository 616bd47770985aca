"""The model of a worker: checkpoint, arenas, layers, the stage that runs a span, the sampler."""
