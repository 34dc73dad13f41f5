"""One file per backend. Each has the same functions: `unavailable`, `unsupported`, `step_`, `vjp_`, `replay_`, `dot`.

`reference.py` documents them.
"""
