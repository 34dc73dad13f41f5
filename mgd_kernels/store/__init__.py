"""The state store: tensors written once and read back in a known order, from host memory and disk.

Import `Store`, and `Key` for annotations; `CHUNK` and `PAGE` are the sizes that a byte-exact budget needs
(docs/format.md). It needs the package's C++ extension, and looks into `errors` and `memory` only.
"""

from mgd_kernels.store.format import CHUNK, PAGE, Key
from mgd_kernels.store.store import Store

__all__ = ["CHUNK", "PAGE", "Key", "Store"]
