"""One optimizer state with its gradient and adjoints, and the passes of the kernels over it.

Bytes per parameter in float32, with S tensors beside the parameters: the step reads parameters, slots and gradient and
writes all but the gradient; the VJP reads those and the adjoints, and writes the adjoints and the cotangent of the
gradient; a replay of k steps reads and writes the state once, and k gradients; the step with its JVP reads state,
tangents, gradient and the tangent of the gradient, and writes state and tangents.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mgd_kernels.arena import Segments
from mgd_kernels.backends import reference
from mgd_kernels.backends.interface import Backend
from mgd_kernels.rules import ADAM, SGD_MOMENTUM, Rule

RULES: dict[str, tuple[Rule, list[float]]] = {
    # learning rate, decoupled and coupled weight decay, then beta1, beta2, eps, eps_root; or momentum, dampening
    "AdamW": (ADAM, [1e-3, 0.01, 0.0, 0.9, 0.999, 1e-8, 1e-8]),
    "SGD-momentum": (SGD_MOMENTUM, [1e-2, 0.0, 5e-4, 0.9, 0.0]),
}
VJPS = {"vjp": None, "vjp_rates": 2, "vjp_none": 0}  # and how many columns each has the cotangents of
K = 10  # the number of the step, past the first ones with their large bias corrections


class Problem:
    """Random tensors of `n` parameters for one rule; `backend` is a module of `mgd_kernels.backends`."""

    def __init__(self, name: str, backend: Backend, n: int, device: torch.device | str = "cpu", logged: int = 8):
        self.rule, hyper = RULES[name]
        self.name, self.backend, self.n, self.device, self.logged = name, backend, n, device, logged
        generator = torch.Generator(device).manual_seed(0)

        def draw() -> Tensor:
            return torch.rand(n, device=device, generator=generator)

        width = 1 + len(self.rule.slots)
        self.state, self.adjoint, self.tangent = ([draw() for _ in range(width)] for _ in range(3))
        self.grads = [draw() for _ in range(logged)]  # apart in memory, so that a replay must read each
        self.grad, self.u, self.grad_tangent = self.grads[0], torch.zeros(n, device=device), self.grads[1]
        self.hyper = torch.tensor([hyper], dtype=torch.float64)
        self.segments = Segments.single(n)

    def bytes(self, pass_: str) -> int:
        """That one parameter must move."""
        width = len(self.state)
        tensors = {"step": 2 * width + 1, "replay": 2 * width + self.logged, "jvp": 4 * width + 2}
        tensors |= dict.fromkeys(VJPS, 3 * width + 2)
        return 4 * tensors[pass_]

    def step(self) -> None:
        p, *slots = self.state
        self.backend.step_(self.rule, p, slots, self.grad, self.hyper, K, self.segments)

    def vjp(self, **wanted: Any) -> Tensor:
        p, *slots = self.state
        a, *adjoint = self.adjoint
        return self.backend.vjp_(
            self.rule, p, slots, self.grad, self.hyper, K, self.segments, a, adjoint, self.u, **wanted
        )

    def vjp_rates(self) -> Tensor:
        """With the cotangents of learning rate and weight decay alone."""
        return self.vjp(wanted="rates")

    def vjp_none(self) -> Tensor:
        """Without cotangents of hyperparameters."""
        return self.vjp(wanted="none")

    def replay(self) -> None:
        """`logged` steps in one pass."""
        p, *slots = self.state
        hypers = self.hyper.expand(self.logged, 1, -1).contiguous()
        scales = [1.0] * self.logged
        self.backend.replay_(self.rule, p, slots, self.grads, hypers, K, self.segments, scales)

    def jvp(self, backend: Backend | None = None) -> None:
        """The step, and its JVP along one direction in which every hyperparameter moves."""
        p, *slots = self.state
        (backend or self.backend).jvp_(
            self.rule, p, slots, self.grad, self.hyper, K, self.segments, [self.tangent], [self.grad_tangent],
            self.hyper[None], advance=True,
        )  # fmt: skip

    # --- what they are compared with ----------------------------------------------------------------------------

    def autograd(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """The cotangents of the state, the gradient and every hyperparameter, through torch."""
        inputs = [x.detach().to(dtype).requires_grad_() for x in (*self.state, self.grad)]
        hyper = [x.clone().to(self.device).requires_grad_() for x in self.hyper[0]]
        new = reference.step(self.rule, inputs[0], inputs[1:-1], inputs[-1], hyper, K)
        return torch.autograd.grad(new, [*inputs, *hyper], [a.to(dtype) for a in self.adjoint])

    def optim(self) -> Callable[[], Any]:
        """The step of torch.optim on the same tensors."""
        p = torch.nn.Parameter(self.state[0])
        p.grad = self.grad
        h = dict(zip(self.rule.hyper, self.hyper[0].tolist(), strict=True))
        optimizer: torch.optim.Optimizer
        if self.rule is ADAM:
            betas = (h["beta1"], h["beta2"])
            optimizer = torch.optim.AdamW([p], h["lr"], betas, h["eps"], h["weight_decay"])
        else:
            optimizer = torch.optim.SGD([p], h["lr"], h["momentum"], h["dampening"], h["l2"])
        optimizer.step()  # makes its own state
        return optimizer.step

    def errors(self) -> dict[str, float]:
        """The largest relative errors (in norm) of every pass against float64, on copies of the state."""
        mutable = (*self.state, *self.adjoint, *self.tangent)
        kept = [x.clone() for x in mutable]
        width = len(self.state)
        precise = [x.double() for x in self.state]
        h = self.hyper[0].tolist()

        def advanced(state: list[Tensor], steps: int) -> list[Tensor]:
            for i in range(steps):
                state = list(reference.step(self.rule, state[0], state[1:], self.grads[i].double(), h, K + i))
            return state

        def restore() -> None:
            for mine, old in zip(mutable, kept, strict=True):
                mine.copy_(old)

        found = {}
        wanted = self.autograd(torch.float64)
        for name, columns in VJPS.items():
            if name != "vjp" and not getattr(self.backend, "CHOOSES_SUMS", False):
                continue
            hyper = getattr(self, name)()[0, :-1]
            mine = [*self.adjoint, self.u]
            found[name] = max(_error(a, b) for a, b in zip(mine, wanted[: width + 1], strict=True))
            pairs = list(zip(hyper, wanted[width + 1 :], strict=True))[:columns]
            found[f"{name}, hyperparameters"] = max([_error(a, b.to(a.device)) for a, b in pairs], default=0.0)
            restore()
        for name, steps in (("step", 1), ("replay", self.logged)):
            getattr(self, name)()
            found[name] = max(_error(a, b) for a, b in zip(self.state, advanced(precise, steps), strict=True))
            restore()
        moved = [x.double() for x in self.tangent]
        tangents = reference.jvp(
            self.rule, precise[0], precise[1:], self.grad.double(), h, K, moved, self.grad_tangent.double(), h
        )
        self.jvp()
        found["jvp"] = max(_error(a, b) for a, b in zip(self.tangent, tangents, strict=True))
        restore()
        return found


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


def plain(to: Tensor, source: Tensor) -> dict[str, tuple[Callable[[], object], int]]:
    """Passes that do nothing but move memory, as in STREAM (McCalpin 1995), with their bytes per element: what the
    kernels are measured against. A copy to other memory may read what it overwrites; a pass in place does not."""
    found: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: to.copy_(source), 8),
        "add in place": (lambda: to.add_(source), 12),
    }
    if to.device.type == "cpu":
        found["memcpy"] = (memcpy(to, source), 8)
    return found


def memcpy(to: Tensor, source: Tensor) -> Callable[[], object]:
    """The C library's copy, which may bypass the cache."""
    function = ctypes.CDLL(None).memcpy
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_void_p
    return lambda: function(to.data_ptr(), source.data_ptr(), to.nbytes)
