"""Complete uses of metagradients, each a folder with a function `run` and a command: `mgd demo`, `mgd recipe ...`.

Import a recipe's `run` and `Settings`, the small networks (`models`) and the data sets (`data`). Looks into `ui` and
`util`, and into the engine as a user does: training functions, descent, attribution, the rater, checks, schedules.
Never into `bench` or `cli`.
"""
