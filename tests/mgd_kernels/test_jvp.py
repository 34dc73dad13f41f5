"""The JVP of a step is the transpose of its VJP, and the limit of finite differences."""

from __future__ import annotations

import pytest
import torch

from mgd_kernels import SGD, Adam, AdamW, Arena, Muon, RMSprop, UpdateRule
from mgd_kernels.errors import BadArgument

GROUPS = [{"params": "b", "lr": 0.03}]
OPTIMIZERS = [
    SGD(lr=0.1, weight_decay=0.1),
    SGD(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1, decoupled=True),
    SGD(lr=0.1, momentum=0.9, nesterov=True, param_groups=GROUPS),
    Adam(lr=0.01, weight_decay=0.1, eps_root=1e-6),
    AdamW(lr=0.01, param_groups=GROUPS),
    RMSprop(weight_decay=0.1),
    Muon(weight_decay=0.1),
]
SHAPES = {"a": (30, 20), "b": (7,)}


def drawn(arena, positive=False):
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in arena.shapes]
    return arena.flatten([x.abs() + 0.1 for x in tensors] if positive else tensors)


def problem(optimizer, step):
    torch.manual_seed(0)
    arena = Arena({name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()})
    state = optimizer.init(drawn(arena), arena)
    state.step = step
    for slot in state.slots:
        slot.copy_(drawn(arena, positive=True))
    tangent, adjoint = state.clone(), state.clone()
    for x in (*tangent.tensors(), *adjoint.tensors()):
        x.copy_(drawn(arena))
    hyper_tangent = optimizer.table() * torch.randn(optimizer.groups, optimizer.width, dtype=torch.float64)
    return arena, state, tangent, adjoint, drawn(arena), drawn(arena), hyper_tangent


def inner(xs, ys):
    return sum((x * y).sum() for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
@pytest.mark.parametrize("step, scale", [(0, 1.0), (3, 0.5)])
def test_it_is_the_transpose_of_the_vjp(optimizer, step, scale):
    _, state, tangent, adjoint, grad, grad_tangent, hyper_tangent = problem(optimizer, step)
    before, seed, kept = tangent.clone(), adjoint.clone(), state.clone()
    optimizer.step_jvp_(state, grad, None, tangent, scale * grad_tangent, hyper_tangent, scale)
    u = torch.zeros_like(grad)
    table = optimizer.vjp_table_(state, grad, optimizer.table(step=step), adjoint, u, scale)
    expected = inner(adjoint.tensors(), before.tensors()) + inner([u], [grad_tangent])
    expected = expected + inner([table[:, :-1]], [hyper_tangent])
    torch.testing.assert_close(inner(seed.tensors(), tangent.tensors()), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(x, y) for x, y in zip(state.tensors(), kept.tensors(), strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_it_is_the_limit_of_differences(optimizer):
    _, state, tangent, _, grad, grad_tangent, hyper_tangent = problem(optimizer, 2)
    h, ends = 1e-6, []
    for sign in (h, -h):
        moved = state.clone()
        for x, dx in zip(moved.tensors(), tangent.tensors(), strict=True):
            x.add_(dx, alpha=sign)
        optimizer.step_(moved, grad + sign * grad_tangent, optimizer.table(step=2) + sign * hyper_tangent)
        ends.append(moved)
    optimizer.step_jvp_(state, grad, None, tangent, grad_tangent, hyper_tangent)
    for ahead, behind, found in zip(*(end.tensors() for end in ends), tangent.tensors(), strict=True):
        torch.testing.assert_close(found, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_several_directions_and_the_step_in_one_call(optimizer):
    _, state, first, second, grad, moved, hyper_tangent = problem(optimizer, 2)
    alone = [first.clone(), second.clone()]
    hypers = torch.stack([hyper_tangent, torch.zeros_like(hyper_tangent)])
    optimizer.step_jvp_(state, grad, None, alone[0], moved, hyper_tangent)
    optimizer.step_jvp_(state, grad, None, alone[1], grad)
    stepped = state.clone()
    optimizer.step_(stepped, grad)
    optimizer.step_jvp_(state, grad, None, [first, second], [moved, grad], hypers, advance=True)
    for mine, wanted in zip((first, second, state), (*alone, stepped), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine.tensors(), wanted.tensors(), strict=True))
    assert state.step == stepped.step == 3
    with pytest.raises(BadArgument, match="for each of 2 tangents"):
        optimizer.step_jvp_(state, grad, None, [first, second], [moved])


def test_elements_that_never_saw_a_gradient_do_not_move():
    optimizer = Adam(eps=0.0)
    state = optimizer.init(torch.ones(3, dtype=torch.float64))
    tangent = state.zeros_like()
    tangent.params.fill_(2.0)
    optimizer.step_jvp_(state, torch.zeros(3, dtype=torch.float64), None, tangent, torch.zeros(3, dtype=torch.float64))
    assert tangent.params.tolist() == [2.0] * 3 and not any(slot.any() for slot in tangent.slots)


def test_an_update_that_returns_what_it_was_given():
    rule = UpdateRule(lambda p, s, g, h, k: (p - h["lr"] * s["last"], {"last": g}), ("last",), {"lr": 0.5}, True)
    state = rule.init(torch.ones(2, dtype=torch.float64))
    tangent = state.zeros_like()
    tangent.slots[0].fill_(1.0)
    rule.step_jvp_(state, torch.ones(2, dtype=torch.float64), None, tangent, torch.full((2,), 3.0, dtype=torch.float64))
    assert tangent.params.tolist() == [-0.5] * 2 and tangent.slots[0].tolist() == [3.0] * 2


def test_shapes_are_checked():
    optimizer = SGD(lr=0.1)
    state = optimizer.init(torch.ones(3))
    with pytest.raises(BadArgument, match="gradient"):
        optimizer.step_jvp_(state, torch.ones(3), None, state.zeros_like(), torch.ones(4))
    with pytest.raises(BadArgument, match="hyper_tangent"):
        optimizer.step_jvp_(state, torch.ones(3), None, state.zeros_like(), torch.ones(3), torch.ones(2))
    with pytest.raises(BadArgument, match="apart"):
        optimizer.step_jvp_(state, torch.ones(3), None, state, torch.ones(3))
