"""First and second derivatives of a step: by autograd, or from a graph that was captured once.

Import `evaluator_for` (`capture`), which chooses an evaluator. Looks into `step` and `util`.
"""
