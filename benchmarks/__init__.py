"""Measurements of this repository: each is a command, `python -m benchmarks NAME`; not part of the wheel."""
