"""`mgd bench peers`: what people would use instead, on the same trainings from the same numbers.

`command` is the command, `table` what it shows, `alone` one measurement in a process of its own, `methods` the peers.
"""
