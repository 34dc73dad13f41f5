"""A metagradient on many ranks, on paper: time, traffic and memory of each, from bandwidths that makers publish.

The model, and where each figure comes from: docs/scale.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mgd.errors import BadArgument
from mgd.plan.budget import Budget, Costs, Sizes
from mgd.plan.plan import Plan, plan
from mgd.util.text import format_bytes, format_seconds, table

FLOPS = 6  # of a training step, per parameter and token: two of the forward pass, four of the backward pass
HVP = 3  # the second derivatives of a step, in its gradients: the default of `Costs`
UTILISATION = 0.4  # of the published operations per second that large trainings reach
TOKENS = 20  # per parameter, in the whole training, where the tokens per step are not given
DISK = 3_840_000_000_000  # bytes of the drive of each rank, if no budget is given


@dataclass(frozen=True)
class Device:
    """What one rank computes on. flops: per second, dense, in bfloat16. memory: bytes. memory_rate, host_rate,
    disk_write, disk_read: bytes per second, of its memory, to the host in one direction, and of a drive."""

    flops: float
    memory: int
    memory_rate: float
    host_rate: float
    disk_write: float = 4.0e9
    disk_read: float = 6.9e9


DEVICES = {
    "a100": Device(312e12, 80_000_000_000, 2.039e12, 32e9),
    "h100": Device(989e12, 80_000_000_000, 3.35e12, 64e9),
    "h200": Device(989e12, 141_000_000_000, 4.8e12, 64e9),
    "mi300x": Device(1307e12, 192_000_000_000, 5.3e12, 64e9),
}


@dataclass(frozen=True)
class Scale:
    """A training on several ranks.

    parameters: P. ranks: W. slots: flat buffers of the optimizer. width, gradient_width: bytes of an element of the
    state, and of the gradient, which is also what the model computes in. objectives: k. microbatches: of each rank, a
    power of two, so that their sum is one block (`mgd.ranks.blocks`).
    """

    parameters: int
    ranks: int
    slots: int = 2
    width: int = 4
    gradient_width: int = 4
    objectives: int = 1
    microbatches: int = 1

    def __post_init__(self) -> None:
        if min(self.parameters, self.ranks, self.objectives, self.microbatches) < 1:
            raise BadArgument(f"expected at least one parameter, rank and objective; got {self}")

    @property
    def sizes(self) -> Sizes:
        """A rank's share of a snapshot and of a gradient."""
        share = -(-self.parameters // self.ranks)
        return Sizes((1 + self.slots) * self.width * share, self.gradient_width * share, memory="device")

    @property
    def trained_bytes(self) -> int:
        """Bytes that a rank sends to others in a step of the training; it receives as many."""
        return self._sent(self.width + self.gradient_width)

    @property
    def reversed_bytes(self) -> int:
        """The same of a step of the reverse sweep."""
        k = self.objectives
        return self._sent((1 + k) * self.width + k * self.gradient_width)

    @property
    def gathered_bytes(self) -> int:
        """The same of one flat buffer that becomes whole, as the parameters do at the end."""
        return self._sent(self.width)

    def _sent(self, width: int) -> int:
        return width * self.parameters * (self.ranks - 1) // self.ranks

    @property
    def owned_bytes(self) -> int:
        """A rank's part of state, adjoints and directions, which it holds throughout the reverse sweep."""
        k, sizes = self.objectives, self.sizes
        return (1 + k) * sizes.snapshot + k * sizes.snapshot // (1 + self.slots)

    @property
    def working_bytes(self) -> int:
        """What a rank holds beside that at most, without log, snapshots and activations.

        The model's parameters as they came, and trained. Then, in a step of the reverse sweep, a gradient with its
        derivatives and what a double backward pass leaves, as measured; sums over microbatches that wait for their
        neighbours; and on several ranks parameters and directions, whole, and the buffers of the last exchange. Or, at
        the start, the whole state.
        """
        p, k = self.parameters, self.objectives
        waiting = (k + 1) * (self.microbatches.bit_length() - 1)
        step = (k + 3 + waiting) * self.gradient_width * p
        whole, start = ((3 + k) * self.width * p, (1 + self.slots) * self.width * p) if self.ranks > 1 else (0, 0)
        return 2 * self.gradient_width * p + max(start - self.owned_bytes, whole + step)

    def costs(self, device: Device, network: float, tokens: float) -> Costs:
        """Of a step with so many tokens, over all ranks. network: bytes per second of a rank, in each direction.

        Nothing is sent while the model computes, as it is now."""
        compute = FLOPS * self.parameters * tokens / (self.ranks * UTILISATION * device.flops)
        sizes = self.sizes
        update = (2 * sizes.snapshot + sizes.gradient) / device.memory_rate
        reverse = self.objectives * (3 * sizes.snapshot + 2 * sizes.gradient) / device.memory_rate
        return Costs(
            step=compute + self.trained_bytes / network + update,
            hvp=self.objectives * HVP * compute + self.reversed_bytes / network + reverse,
            update=update,
            write={"device": device.memory_rate / 2, "host": device.host_rate, "disk": device.disk_write},
            read={"device": device.memory_rate / 2, "host": device.host_rate, "disk": device.disk_read},
        )


@dataclass(frozen=True)
class Forecast:
    """What a metagradient of the plan takes of each rank."""

    scale: Scale
    device: Device
    network: float
    tokens: float
    plan: Plan

    @property
    def network_bytes(self) -> int:
        """Bytes that each rank sends in all; it receives as many."""
        scale, made = self.scale, self.plan
        steps = made.model_steps * scale.trained_bytes + (made.T - made.stop_at) * scale.reversed_bytes
        return steps + scale.gathered_bytes

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the device: "owned", "working", and "kept", of log and snapshots; without activations."""
        kept = self.plan.peak.get("device", 0)
        return {"owned": self.scale.owned_bytes, "working": self.scale.working_bytes, "kept": kept}

    @property
    def fits(self) -> bool:
        return sum(self.memory_bytes.values()) <= self.device.memory

    def to_dict(self) -> dict[str, Any]:
        return {
            "scale": asdict(self.scale),
            "device": asdict(self.device),
            "network_bytes_per_second": self.network,
            "tokens_per_step": self.tokens,
            "seconds": self.plan.predicted_seconds,
            "network_bytes": self.network_bytes,
            "disk": self.plan.bytes_moved.get("disk", {"written": 0, "read": 0}),
            "memory": self.memory_bytes,
            "fits": self.fits,
            "plan": self.plan.to_dict(),
        }

    def explain(self) -> str:
        """The forecast in words and tables, with the plan of each rank."""
        costs, scale = self.plan.costs, self.scale
        ways = [("training", costs.step, scale.trained_bytes), ("reverse sweep", costs.hvp, scale.reversed_bytes)]
        rows = [
            [name, format_seconds(seconds), format_bytes(sent), format_seconds(sent / self.network)]
            for name, seconds, sent in ways
        ]
        disk = self.plan.bytes_moved.get("disk", {"written": 0, "read": 0})
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.memory_bytes.items())
        memory = f"{format_bytes(sum(self.memory_bytes.values()))} of {format_bytes(self.device.memory)}"
        lines = [
            f"{scale.ranks:,} ranks, {scale.parameters:,} parameters, {self.tokens:,.0f} tokens per step. Each rank:",
            "",
            *table(["a step of the", "seconds", "sent", "seconds of that"], rows),
            "",
            f"time     {format_seconds(self.plan.predicted_seconds)}",
            f"network  {format_bytes(self.network_bytes)} sent, and as much received",
            f"disk     {format_bytes(disk['written'])} written, {format_bytes(disk['read'])} read",
            f"memory   {memory}: {parts}; activations come on top",
        ]
        if not self.fits:
            why = "parameters and gradients are whole on each rank while the model computes"
            lines += ["", f"This does not fit: {why}."]
        return "\n".join([*lines, "", "The plan of each rank:", "", self.plan.explain()])


def forecast(
    steps: int,
    scale: Scale,
    device: Device,
    network: float,
    *,
    tokens: float | None = None,
    budget: Budget | None = None,
    schedule: str = "auto",
) -> Forecast:
    """What a metagradient takes. tokens: per step, of all ranks; by default so many that the training sees `TOKENS` per
    parameter. budget: of each rank for log and snapshots; by default half of what the device has left, and a drive."""
    tokens = TOKENS * scale.parameters / max(1, steps) if tokens is None else tokens
    left = device.memory - scale.owned_bytes - scale.working_bytes
    limits = budget or Budget(device=max(0, left // 2) or None, disk=("runs/log", DISK))
    made = plan(steps, scale.sizes, limits, scale.costs(device, network, tokens), schedule=schedule)
    return Forecast(scale, device, network, tokens, made)
