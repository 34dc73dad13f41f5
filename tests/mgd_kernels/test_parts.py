"""Parts of a training state: steps and VJPs of the parts are those of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mgd_kernels import AdamW, Arena, Muon, RMSprop


@pytest.mark.parametrize("optimizer", [AdamW, RMSprop, Muon])
def test_steps_of_parts_are_those_of_the_whole(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5))
    rule = optimizer(lr=0.1, param_groups=[{"params": "*.bias", "lr": 0.3}])
    arena = Arena.of(model)
    place = arena.offsets[2]
    cut = place if optimizer is Muon else place + 17
    names = [arena.names[:2], arena.names[2:]]
    parts = [arena.part(each) if optimizer is Muon else None for each in names]
    whole = rule.init(arena.flatten(model), arena)
    gradient = torch.randn(arena.numel)
    for flat in (gradient, whole.params):  # padding is zero
        arena.copy_(kept := arena.zeros(), arena.views(flat))
        flat.copy_(kept)
    ranges = [(0, cut), (cut, arena.numel)]
    copies = [whole.part(a, b, part).clone() for (a, b), part in zip(ranges, parts, strict=True)]
    adjoint = rule.init(torch.randn(arena.numel), arena)
    adjoints = [adjoint.part(a, b, part).clone() for (a, b), part in zip(ranges, parts, strict=True)]
    out, found = rule.step_vjp_(whole, gradient, None, adjoint), []
    for (a, b), copy, each in zip(ranges, copies, adjoints, strict=True):
        found.append(rule.step_vjp_(copy, gradient[a:b], None, each))
        rule.step_(copy, gradient[a:b])
    rule.step_(whole, gradient)
    for i, tensor in enumerate(whole.tensors()):
        assert torch.equal(torch.cat([copy.tensors()[i] for copy in copies]), tensor)
        assert torch.equal(torch.cat([each.tensors()[i] for each in adjoints]), adjoint.tensors()[i])
    assert torch.equal(torch.cat([u for u, _ in found]), out[0])
    for name, value in out[1].items():  # sums in another order, of RMSprop and Muon in float32
        torch.testing.assert_close(found[0][1][name] + found[1][1][name], value, rtol=1e-5, atol=1e-5)


def test_segments_of_a_part():
    arena = Arena({"a": torch.zeros(40), "b": torch.zeros(40)})
    segments = arena.segments([0, 1], 2)
    assert segments.part(30, 70).rows() == [(0, 10, 0), (34, 40, 1)]
    assert segments.part(40, 60).rows() == [] and segments.group_at(64) == 1
    assert arena.part(["b"]).numel == 64
