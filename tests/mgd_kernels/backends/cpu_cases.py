"""What the tests of the C++ backend share: every rule, dtype and instruction set, and the settings put back."""

from __future__ import annotations

import pytest
import torch
from kernel_problem import DTYPES, RULES

from mgd_kernels import _core

all_rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
all_dtypes = pytest.mark.parametrize(
    ("dtype", "grad_dtype"), DTYPES, ids=[f"{a}-{b}".replace("torch.", "") for a, b in DTYPES]
)
every_isa = pytest.mark.parametrize("isa", _core.isas())


@pytest.fixture(autouse=True)
def restore():
    threads, isa = torch.get_num_threads(), _core.isa()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    _core.use_isa(isa)
