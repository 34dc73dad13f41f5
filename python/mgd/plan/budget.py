"""What a plan may use (`Budget`), how large its objects are (`Sizes`), and what its actions cost (`Costs`)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from mgd.util.text import parse_bytes

#: The tiers, fastest first. On a machine without an accelerator, "device" and "host" are both plain memory.
TIERS = ("device", "host", "disk")


@dataclass(frozen=True)
class Budget:
    """Memory that snapshots and logged gradients may take on each tier. A tier that is left out is not used.

    device, host: bytes, or text such as "1GB", "512MiB", "0". disk: a pair (directory, size).
    `Budget()` is the default: host memory alone, up to `default_host_bytes` of `plan`, which is a share of the free
    memory.

    Raises ValueError for malformed sizes, and if `disk` is not a pair.
    """

    device: int | str | None = None
    host: int | str | None = None
    disk: tuple[str | os.PathLike[str], int | str] | None = None

    def __post_init__(self) -> None:
        if self.disk is not None and (isinstance(self.disk, str) or len(self.disk) != 2):
            raise ValueError(f'expected disk=(directory, size), such as ("runs/log", "100GB"); got {self.disk!r}')
        self.limits()  # reports malformed sizes here, where the caller wrote them

    @property
    def directory(self) -> str | None:
        """The directory of the disk tier."""
        return None if self.disk is None else os.fspath(self.disk[0])

    def limits(self, default_host_bytes: int | None = None) -> dict[str, int]:
        """The bytes of each tier in use, fastest first. `default_host_bytes`: the host's limit if no tier was given."""
        parts = (self.device, self.host, None if self.disk is None else self.disk[1])
        if all(part is None for part in parts):
            return {} if default_host_bytes is None else {"host": parse_bytes(default_host_bytes)}
        return {tier: parse_bytes(part) for tier, part in zip(TIERS, parts, strict=True) if part is not None}


@dataclass(frozen=True)
class Sizes:
    """Bytes of one snapshot (parameters and optimizer state) and of one gradient, in the dtype the model produces."""

    snapshot: int
    gradient: int

    def __post_init__(self) -> None:
        if self.snapshot < 1 or self.gradient < 1:
            raise ValueError(f"expected at least one byte per snapshot and per gradient; got {self}")


_WRITE = {"device": 5e11, "host": 1e10, "disk": 2e9}
_READ = {"device": 5e11, "host": 1e10, "disk": 6e9}


@dataclass(frozen=True)
class Costs:
    """Seconds per piece of work, and bytes per second of each tier. Predictions are as good as these numbers.

    step: one training gradient and its update. hvp: one adjoint step, that is the optimizer's VJP and the model's HVP
    (default: 3 steps). update: one elementwise update from a logged gradient (default: 1/50 step). write, read: bytes
    per second; tiers left out keep their default. overlap: the tiers whose transfers run beside the computation
    (write-behind and prefetch); copies on the other tiers add to its time. A machine without an accelerator has
    overlap=("disk",), since there the same processor does the memory copies. copy: bytes per second at which the
    processor copies to and from the buffers of overlapping transfers (infinite if another engine does it).

    Raises ValueError for unknown tiers, bandwidths that are not positive, and negative seconds.
    """

    step: float = 1.0
    hvp: float = None  # type: ignore[assignment]
    update: float = None  # type: ignore[assignment]
    write: Mapping[str, float] = field(default_factory=dict)
    read: Mapping[str, float] = field(default_factory=dict)
    overlap: tuple[str, ...] = ("host", "disk")
    copy: float = math.inf

    def __post_init__(self) -> None:
        if unknown := {*self.write, *self.read, *self.overlap} - set(TIERS):
            raise ValueError(f"expected the tiers {', '.join(TIERS)}; got {', '.join(sorted(unknown))}")
        bandwidths = {
            "write": MappingProxyType(_WRITE | dict(self.write)),
            "read": MappingProxyType(_READ | dict(self.read)),
        }
        if min(*bandwidths["write"].values(), *bandwidths["read"].values(), self.copy) <= 0:
            raise ValueError(
                f"expected positive bytes per second; got write={self.write}, read={self.read}, copy={self.copy}"
            )
        for name, value in bandwidths.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "hvp", 3 * self.step if self.hvp is None else self.hvp)
        object.__setattr__(self, "update", self.step / 50 if self.update is None else self.update)
        if not min(self.step, self.hvp, self.update) >= 0:
            raise ValueError(f"expected non-negative seconds; got {self}")

    def __reduce__(self) -> tuple[type[Costs], tuple[object, ...]]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Costs, tuple(dict(x) if isinstance(x, Mapping) else x for x in values.values())
