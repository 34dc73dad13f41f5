"""From a memory budget to a plan: which states to save, which gradients to log, on which tier, and in what order.

Import `Budget`, `Costs` and `Sizes` (`budget`), `plan` and `Plan` (`plan`), the actions that a plan yields (`actions`),
and `PlanRequest` (`training`), which plans for a given model. Looks into `mgd_kernels` and `util`.
"""
