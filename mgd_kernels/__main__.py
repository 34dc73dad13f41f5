"""`python -m mgd_kernels`: which backends work here, and why the others do not."""

from __future__ import annotations

import torch

from mgd_kernels import __version__, backends
from mgd_kernels.dispatch import forced


def report() -> str:
    lines = [f"mgd-kernels {__version__}, torch {torch.__version__}"]
    lines += [f"  {name:10} {'ready' if why is None else 'not available: ' + why}" for name, why in backends().items()]
    if forced():
        lines.append(f"  MGD_KERNELS_BACKEND={forced()} asks for this backend everywhere")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
