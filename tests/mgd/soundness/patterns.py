"""All patterns, by name."""

import patterns_values  # noqa: F401
from pattern import PATTERNS, Kind, Pattern

__all__ = ["PATTERNS", "Kind", "Pattern"]
