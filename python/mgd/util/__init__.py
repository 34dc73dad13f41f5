"""Helpers that every package may use: text for people, fingerprints, the system's memory, progress bars, profiles,
checkpoint directories.

Looks into `mgd.errors` alone.
"""
