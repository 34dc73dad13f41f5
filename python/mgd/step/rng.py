"""The random stream of each step: a function of the seed, the step and the microbatch."""

from __future__ import annotations

import hashlib
import struct

import torch


def seed_of(seed: int, step: int, microbatch: int = 0) -> int:
    """The seed of a step's random stream: a hash of its arguments, so that streams of neighbours are unrelated."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, step, microbatch), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`, and no others."""
    torch.default_generator.manual_seed(seed)
    if generators := device.type != "cpu" and getattr(torch.get_device_module(device), "default_generators", None):
        generators[device.index or 0].manual_seed(seed)
