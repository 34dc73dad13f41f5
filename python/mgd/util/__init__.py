"""What every room may use: text for people, fingerprints, the system's memory, progress bars, profiles, directories.

Looks into `mgd.errors` alone.
"""
