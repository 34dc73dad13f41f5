"""Devices by name, as the command line takes them, and memory of theirs that is set aside."""

from __future__ import annotations

from collections import Counter

import torch

from mgd.errors import BadArgument

# Bytes that torch's allocator holds, that no tensor has, and that no tensor can have: device graphs compute in them.
set_aside: Counter[torch.device] = Counter()


def checked_device(name: str) -> torch.device:
    """The device of this name. Raises BadArgument where torch cannot use it."""
    try:
        device = torch.device(name)
        module = torch.get_device_module(device)
    except RuntimeError:
        raise BadArgument(f'expected a device such as "cpu", "cuda" or "cuda:1"; got {name!r}') from None
    if device.type == "cpu":
        return device
    if not getattr(module, "is_available", bool)():
        raise BadArgument(
            f"expected a device that torch {torch.__version__} can use; it finds no {device.type} here: `mgd doctor` "
            "says what this machine offers"
        )
    if (device.index or 0) >= module.device_count():
        raise BadArgument(f"expected one of {module.device_count()} devices; got {name!r}")
    return device
