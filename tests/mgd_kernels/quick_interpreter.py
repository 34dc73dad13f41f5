"""Triton's interpreter, which by itself patches the language for each call of our functions: most of its time."""

from __future__ import annotations

import torch

if not torch.cuda.is_available():
    from triton.runtime.interpreter import InterpretedFunction

    _call = InterpretedFunction.__call__
    InterpretedFunction.__call__ = lambda self, *args, **kwargs: (
        _call(self, *args, **kwargs)
        if self.fn.__module__.startswith("triton.")
        else self.rewrite()(*args, **kwargs)
    )  # fmt: skip
