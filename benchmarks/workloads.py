"""The workloads live in the package, so that `mgd bench` has them wherever it is installed."""

from mgd.bench.workload import Workload
from mgd.bench.workloads import WORKLOADS, convnet, gpt, mlp

__all__ = ["WORKLOADS", "Workload", "convnet", "gpt", "mlp"]
