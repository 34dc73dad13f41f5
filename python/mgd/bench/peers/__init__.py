"""`mgd bench peers`: what people would use instead, on the same trainings from the same numbers.

Import `measure` from `command`, `PEERS` from `methods`. `alone` is one measurement in a process of its own, `table`
what is shown; the other modules are the peers. Looks into `bench`, `recipes.models`, `ui` and the engine. Never into
`cli`.
"""
