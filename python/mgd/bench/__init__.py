"""Benchmarks that users run: `mgd bench ...`."""
