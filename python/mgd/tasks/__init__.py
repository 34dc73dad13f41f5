"""Many small trainings as one function of what they share, one after another or at once.

Import `mean_over` from `mgd`. The rooms it looks into: `function` and those below it.
"""

from mgd.tasks.mean import mean_over

__all__ = ["mean_over"]
