"""Measurements that the documentation quotes; each subpackage is one command, `python -m benchmarks.NAME`."""
