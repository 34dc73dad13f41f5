"""Helpers that every package may use: text for people, fingerprints, the system's memory, progress bars, profiles,
files, and directories of runs.

Looks into `mgd.errors` alone, and into the state store.
"""
