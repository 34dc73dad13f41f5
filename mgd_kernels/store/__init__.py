"""The state store: tensors written once and read back in a known order, from host memory and disk.

Import `Store`; `CHUNK` and `PAGE` are the sizes that a byte-exact budget needs (docs/format.md). Needs the package's
C++ extension. Looks into `mgd_kernels.errors` alone.
"""

from mgd_kernels.store.format import CHUNK, PAGE, Key
from mgd_kernels.store.store import Store

__all__ = ["CHUNK", "PAGE", "Key", "Store"]
