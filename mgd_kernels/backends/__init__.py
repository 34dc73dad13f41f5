"""One file per backend. Each has the same functions: `unavailable`, `unsupported`, `step_`, `vjp_`, `replay_`, `dot`.

`reference.py` documents them. What a backend may have beyond them: `OUT_OF_PLACE` and `update`, `update_vjp`
(`cpu.py`). `addresses.py` holds the checks of those that hand addresses to compiled code.
"""
