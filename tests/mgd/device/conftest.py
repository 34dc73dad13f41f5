"""Fixtures of this folder."""

from interruptions import interrupt, often  # noqa: F401
