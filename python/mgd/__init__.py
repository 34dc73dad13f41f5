"""Exact metagradients: the gradient of a trained model's output with respect to how it was trained."""

from mgd import errors
from mgd.budget import Budget
from mgd.function import Metagradient, Trained, TrainingFunction
from mgd.planner import Plan
from mgd.report import Report

__all__ = ["Budget", "Metagradient", "Plan", "Report", "Trained", "TrainingFunction", "errors"]
