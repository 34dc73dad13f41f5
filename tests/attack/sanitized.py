"""A pytest plugin: the extension of the file that MGD_SANITIZED names, instead of the installed one.

Its store is compiled with the sanitizers of gcc; `make sanitize` builds it and runs the store's tests on it.
"""

from __future__ import annotations

import importlib.util
import os
import sys

spec = importlib.util.spec_from_file_location("mgd_kernels._core", os.environ["MGD_SANITIZED"])
assert spec is not None and spec.loader is not None
module = importlib.util.module_from_spec(spec)
sys.modules["mgd_kernels._core"] = module
spec.loader.exec_module(module)
