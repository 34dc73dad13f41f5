"""What a plan may use (`Budget`), how large its objects are (`Sizes`), and what its actions cost (`Costs`)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from mgd.errors import BadArgument
from mgd.util.files import path_of
from mgd.util.text import parse_bytes

#: The tiers, fastest first. On a machine without an accelerator, "device" and "host" are both plain memory.
TIERS = ("device", "host", "disk")


@dataclass(frozen=True)
class Budget:
    """Memory that snapshots and logged gradients may take on each tier. A tier that is left out is not used.

    device, host: bytes, or text such as "1GB", "512MiB", "0". disk: a pair (directory, size).
    `Budget()` is the default: host memory alone, up to `default_host_bytes` of `plan`, which is a share of the free
    memory.

    Raises BadArgument for malformed sizes, and if `disk` is not a pair of a path and a size.
    """

    device: int | str | None = None
    host: int | str | None = None
    disk: tuple[str | os.PathLike[str], int | str] | None = None

    def __post_init__(self) -> None:
        if self.disk is not None and not (isinstance(self.disk, tuple | list) and len(self.disk) == 2):
            raise BadArgument(f'expected disk=(directory, size), such as ("runs/log", "100GB"); got {self.disk!r}')
        if self.disk is not None:
            path_of(self.disk[0])
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
    """Bytes of one snapshot (parameters and optimizer state) and of one gradient, in the dtype the model produces.

    residuals: what one captured step can keep for its second derivatives; 0: nothing. memory: the tier that is the
    training's own memory, the only one where they can be.

    Raises ValueError for sizes that make no sense and an unknown tier.
    """

    snapshot: int
    gradient: int
    residuals: int = 0
    memory: str = "host"

    def __post_init__(self) -> None:
        if self.snapshot < 1 or self.gradient < 1 or self.residuals < 0:
            raise ValueError(
                f"expected at least one byte per snapshot and per gradient, and none or more per residuals; got {self}"
            )
        if self.memory not in TIERS:
            raise ValueError(f"expected the tier of residuals among {', '.join(TIERS)}; got {self.memory!r}")


#: What kept residuals save of a step's second derivatives, if not measured: about the step's own gradient, less what is
#: then moved and what the second derivatives alone can leave out.
RESIDUALS = 0.7

_WRITE = {"device": 5e11, "host": 1e10, "disk": 2e9}
_READ = {"device": 5e11, "host": 1e10, "disk": 6e9}


@dataclass(frozen=True)
class Costs:
    """Seconds per piece of work, and bytes per second of each tier. Predictions are as good as these numbers.

    step: one training gradient and its update. hvp: one adjoint step, that is the optimizer's VJP and the model's HVP
    (default: 3 steps). hvp_kept: the same where the step's residuals were kept, at most hvp (default: `RESIDUALS` of a
    step less). update: one elementwise update from a logged gradient (default: 1/50 step). write, read: bytes per
    second; tiers left out keep their default. overlap: the tiers whose transfers run beside the computation
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
    hvp_kept: float = None  # type: ignore[assignment]

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
        kept = max(0.0, self.hvp - RESIDUALS * self.step) if self.hvp_kept is None else self.hvp_kept
        object.__setattr__(self, "hvp_kept", kept)
        object.__setattr__(self, "update", self.step / 50 if self.update is None else self.update)
        if not (min(self.step, self.hvp, self.update, kept) >= 0 and kept <= self.hvp):
            raise ValueError(f"expected non-negative seconds, and hvp_kept of at most hvp; got {self}")

    def __reduce__(self) -> tuple[type[Costs], tuple[object, ...]]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Costs, tuple(dict(x) if isinstance(x, Mapping) else x for x in values.values())
