"""Exact metagradients: the gradient of a trained model's output with respect to how it was trained.

Import from here what `__all__` lists: it is the public interface. docs/architecture.md says what the rooms inside are
for, and which one looks into which.
"""

from mgd import errors, schedules
from mgd.attribution.attribute import attribute
from mgd.attribution.result import Attribution
from mgd.check import CheckResult, check, metasmoothness
from mgd.descent.constraints import Box, Simplex
from mgd.descent.descent import Descent, MetaDescent
from mgd.descent.sign_descent import SignDescent
from mgd.diagnose import Diagnosis, diagnose
from mgd.function import TrainingFunction
from mgd.integrations.batches import RecordedBatches, batches
from mgd.plan.budget import Budget
from mgd.plan.plan import Plan
from mgd.rater.data_rater import DataRater
from mgd.results import Jvp, Metagradient, Report, Trained, load
from mgd.tasks import mean_over
from mgd.util.system import keep_freed_memory
from mgd_kernels import __version__

__all__ = [
    "Attribution",
    "Box",
    "Budget",
    "CheckResult",
    "DataRater",
    "Descent",
    "Diagnosis",
    "Jvp",
    "MetaDescent",
    "Metagradient",
    "Plan",
    "RecordedBatches",
    "Report",
    "SignDescent",
    "Simplex",
    "Trained",
    "TrainingFunction",
    "__version__",
    "attribute",
    "batches",
    "check",
    "diagnose",
    "errors",
    "keep_freed_memory",
    "load",
    "mean_over",
    "metasmoothness",
    "schedules",
]
