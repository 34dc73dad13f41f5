"""The state store against raw direct I/O; `mgd bench offload` prints the same as a table."""

from __future__ import annotations

from typing import Any

import pytest

from mgd.bench.store_io import SIZES, measure


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_bandwidth_and_overhead(benchmark: Any, tmp_path: Any, size: int) -> None:
    result = benchmark.pedantic(measure, (tmp_path, size), rounds=1)
    benchmark.extra_info.update(result)
