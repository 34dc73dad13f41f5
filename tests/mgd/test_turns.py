"""Calls give back what they changed of the process: after interrupts, and in forks that other threads make."""

from __future__ import annotations

import os
import signal
import threading
import warnings

import pytest
import torch
from cases import cross_entropy, mlp, supervised
from torch.overrides import _get_current_function_mode_stack

from mgd.step.overrides import FunctionOverrides
from mgd.step.turn import turn

CASE = supervised(mlp(), (5,))


class Interrupt(BaseException):
    pass


def test_function_modes_that_an_interrupt_left_behind():
    model, mine = mlp(), FunctionOverrides()
    with mine:
        with pytest.raises(Interrupt), turn(model):
            FunctionOverrides().__enter__()  # and no block that would leave it again
            raise Interrupt
        assert _get_current_function_mode_stack() == [mine]
        with pytest.raises(Interrupt), turn(model):
            torch._C._pop_torch_function_stack()  # as torch does for a moment, at each call
            raise Interrupt
        assert _get_current_function_mode_stack() == [mine]
    assert not _get_current_function_mode_stack()


def test_a_fork_while_another_thread_has_the_turn():
    """It would wait forever for a thread that it does not have, with that thread's tensors in its model."""
    model, inside, leave = CASE.model, threading.Event(), threading.Event()
    original = [id(p) for p in model.parameters()]

    def loss(model, batch, z):
        inside.set()
        assert leave.wait(60)
        return cross_entropy(model, batch, z)

    thread = threading.Thread(target=CASE.but(loss=loss).function(trace=False).train, args=(CASE.z,))
    thread.start()
    try:
        assert inside.wait(60)
        assert [id(p) for p in model.parameters()] != original
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python and torch warn of forks with threads
            child = os.fork()
        if child == 0:
            signal.alarm(60)  # ends the child if it hangs
            same = [id(p) for p in model.parameters()] == original
            with turn(model):
                os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        leave.set()
        thread.join()
    assert [id(p) for p in model.parameters()] == original
