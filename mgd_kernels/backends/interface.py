"""What a backend is: a module with these functions. Their contracts are stated here, once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

from torch import Tensor

from mgd_kernels.arena import Segments
from mgd_kernels.rules import Rule

Leaves: TypeAlias = Sequence[Tensor | None]


class Backend(Protocol):
    """Steps, their VJPs and replays over flat buffers, in place. Elements outside every segment stay as they are.

    A backend with `OUT_OF_PLACE = True` also takes `out=` in `step_`, `replay_` and `vjp_`: tensors apart from all
    others, which receive the elements of the segments of what otherwise is overwritten. One with `WRITES_COPY = True`
    takes `low=` in `step_` and `replay_`: a 16-bit `[n]` tensor that receives the new parameters in the same pass. One
    with `CHOOSES_SUMS = True` takes `wanted=` in `vjp_`: which cotangents of hyperparameters are computed. The others
    are 0.
    """

    def unavailable(self) -> str | None:
        """None where the backend works in this process, otherwise the reason and what to do."""

    def unsupported(self, rule: Rule, params: Tensor, grad: Tensor) -> str | None:
        """None where the backend serves these tensors, otherwise the reason."""

    def step_(
        self,
        rule: Rule,
        params: Tensor,
        slots: Sequence[Tensor],
        grad: Tensor,
        hyper: Tensor,
        k: int,
        segments: Segments,
        grad_scale: float | Tensor = 1.0,
    ) -> None:
        """Advance `params` and `slots` in place by step number `k` (1, 2, ...) with gradient `grad_scale * grad`.

        params, slots: `[n]`, one dtype. grad: `[n]`, that dtype or a 16-bit one. hyper: float64 `[G, H]`, on the CPU
        or on the device of params. grad_scale: a number or a 0-d float64 tensor.
        """

    def replay_(
        self,
        rule: Rule,
        params: Tensor,
        slots: Sequence[Tensor],
        grads: Sequence[Tensor],
        hypers: Tensor,
        k: int,
        segments: Segments,
        grad_scales: Sequence[float | Tensor],
    ) -> None:
        """Steps `k, k + 1, ...` in place, one for each of `grads`; hypers: float64 `[len(grads), G, H]`.

        Bit-identical to single steps.
        """

    def vjp_(
        self,
        rule: Rule,
        params: Tensor,
        slots: Sequence[Tensor],
        grad: Tensor,
        hyper: Tensor,
        k: int,
        segments: Segments,
        adjoint_params: Tensor,
        adjoint_slots: Sequence[Tensor],
        u: Tensor,
        grad_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """Turn the adjoints of the state after step `k` into those of the state before it, in place.

        params and slots are the state before the step and stay as they are. `u` `[n]` receives the cotangent of `grad`
        (with `grad_scale` held fixed). Returns float64 `[G, H + 1]`: the cotangent of every hyperparameter and, in the
        last column, that of `grad_scale`.
        """

    def jvp_(
        self,
        rule: Rule,
        params: Tensor,
        slots: Sequence[Tensor],
        grad: Tensor,
        hyper: Tensor,
        k: int,
        segments: Segments,
        tangents: Sequence[Sequence[Tensor]],
        grad_tangents: Sequence[Tensor],
        hyper_tangents: Tensor,
        grad_scale: float | Tensor = 1.0,
        advance: bool = False,
    ) -> None:
        """For each of D directions, turn the tangents of `(params, *slots)` into those after step `k`, in place.

        tangents: D of `(params, *slots)`, each `[n]`. grad_tangents: D tangents of the scaled gradient
        `grad_scale * grad`, `[n]`. hyper_tangents: float64 `[D, G, H]`. advance: `params` and `slots` make the step in
        the same pass, with the bits of `step_`; else they stay as they are.
        """

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner product of two `[n]` tensors, accumulated in float64: a 0-d float64 tensor."""


class LeafBackend(Backend, Protocol):
    """A backend that also takes leaves where they lie (`integrations/flat.py` does it on top of any other).

    Leaf lists have one length; leaves are contiguous, in the dtype of the state, gradients also in a 16-bit one; None
    stands for zeros. hyper: float64 `[G, H]` in the rule's columns, `l2` being 0; groups: the row of each leaf.
    """

    def update(
        self,
        rule: Rule,
        params: Leaves,
        slots: Sequence[Leaves],
        grads: Leaves,
        hyper: Tensor,
        k: int,
        groups: Sequence[int],
        updates: Sequence[Tensor],
        new_slots: Sequence[Sequence[Tensor]],
    ) -> None:
        """Write the updates `p' - p` and the slots after step `k`; new_slots may be the slots themselves."""

    def update_vjp(
        self,
        rule: Rule,
        params: Leaves,
        slots: Sequence[Leaves],
        grads: Leaves,
        hyper: Tensor,
        k: int,
        groups: Sequence[int],
        adjoint_updates: Leaves,
        adjoint_slots: Sequence[Leaves],
        new_adjoint_params: Leaves,
        new_adjoint_slots: Sequence[Leaves],
        u: Sequence[Tensor],
        hyper_wanted: bool = True,
    ) -> Tensor | None:
        """From the cotangents of the updates and of the new slots: write those of the parameters, of the slots and,
        in `u`, of the gradients; None in `new_adjoint_*` for one that is not wanted. Returns those of hyper, float64
        `[G, H + 1]` as in `vjp_`, or anything where they are not wanted."""
