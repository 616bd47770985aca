"""What produced the numbers in the README: each command is `python -m benchmarks.<name>`."""
