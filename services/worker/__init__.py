"""The worker service: one device, one memory budget, one or more layers of the model."""
