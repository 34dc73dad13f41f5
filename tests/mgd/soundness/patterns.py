"""All patterns, by name."""

from importlib import import_module

from pattern import PATTERNS, Kind, Pattern

for part in ("shapes", "reads", "values", "operators", "layers", "state", "backward"):
    import_module(f"patterns_{part}")

__all__ = ["PATTERNS", "Kind", "Pattern"]
