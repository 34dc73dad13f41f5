"""Exact metagradients: the gradient of a trained model's output with respect to how it was trained."""

from mgd import errors
from mgd.attribution import attribute
from mgd.attribution_result import Attribution
from mgd.budget import Budget
from mgd.check import CheckResult, check
from mgd.constraints import Box, Simplex
from mgd.data_rater import DataRater
from mgd.descent import Descent, MetaDescent
from mgd.function import TrainingFunction
from mgd.planner import Plan
from mgd.report import Report
from mgd.results import Metagradient, Trained
from mgd.sign_descent import SignDescent
from mgd.smoothness import metasmoothness

__all__ = [
    "Attribution",
    "Box",
    "Budget",
    "CheckResult",
    "DataRater",
    "Descent",
    "MetaDescent",
    "Metagradient",
    "Plan",
    "Report",
    "SignDescent",
    "Simplex",
    "Trained",
    "TrainingFunction",
    "attribute",
    "check",
    "errors",
    "metasmoothness",
]
