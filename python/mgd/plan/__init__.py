"""From a memory budget to a plan: which states to keep, which gradients to log, on which tier, and in what order.

Import `Budget`, `Costs`, `Sizes` (`budget`), `plan`, `Plan` (`plan`), the actions a plan yields (`actions`), and
`plan_training` (`training`), which plans for a given model. Looks into `mgd_kernels` and `util`.
"""
