"""Calls take turns: each changes what the whole process shares, and gives it back, whatever ends it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import _get_current_function_mode_stack

from mgd.step.determinism import deterministic_on
from mgd.step.model import model_kept

# A call changes torch's default generators and flags, and the model's tensors, which other functions may share.
_one_at_a_time = threading.RLock()
_borrowed: list[contextlib.ExitStack] = []  # gives back what the calls of the thread that has the turn have changed


@contextlib.contextmanager
def turn(model: nn.Module) -> Iterator[None]:
    """Calls from other threads wait. At the end the model, torch's flags, its generators and its function modes are as
    before, also where an interrupt came between the beginning of something and the block that ends it."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = _get_current_function_mode_stack()
    with (
        _one_at_a_time,
        torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type),
        contextlib.ExitStack() as borrowed,
    ):
        _borrowed.append(borrowed)
        try:
            borrowed.enter_context(deterministic_on(device))
            # The fused attention kernels have no second derivatives.
            borrowed.enter_context(sdpa_kernel(SDPBackend.MATH))
            borrowed.enter_context(model_kept(model))
            yield
        except BaseException:
            _set_function_modes(modes)
            raise
        finally:
            _borrowed.remove(borrowed)


def _set_function_modes(modes: list[torch.overrides.TorchFunctionMode]) -> None:
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


def _forked() -> None:
    """In a fork: only the thread that forked lives on. A call of another one ends here, and its turn."""
    global _one_at_a_time
    if _one_at_a_time._is_owned():  # type: ignore[attr-defined]
        return  # the call goes on, in both processes
    _one_at_a_time = threading.RLock()
    while _borrowed:
        _borrowed.pop().close()


os.register_at_fork(after_in_child=_forked)
