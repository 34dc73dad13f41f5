"""The `mgd` command: `main` finds the commands of recipes and benchmarks and runs them; `doctor` and `plan` live here.

The top of the house: it looks into every room, and nothing imports it.
"""
