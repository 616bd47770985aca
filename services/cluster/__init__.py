"""What the `kunserve` command does besides running one service.

It runs a local cluster, asks running ones, and checks machines. To it services are settings and
processes; it imports no code that serves.
"""
