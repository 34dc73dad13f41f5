"""Benchmarks that users run: `mgd bench ...` on the package's own workloads, `mgd profile ...` on a user's training.

Import `measure` from a benchmark's module, the workloads, and how times are taken (`timing`). Looks into `ui`, `util`,
`recipes.models`, `recipes.data`, and into the engine and the kernels that it measures. Never into `cli`.
"""
