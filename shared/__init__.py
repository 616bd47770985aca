"""What the services agree on: subjects, messages, the bus, settings, logging, metrics, layout.

`shared` imports no service; services import `shared` and never each other.
"""
