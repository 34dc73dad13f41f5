"""Average pooling: what it becomes in a graph, and inputs of other layouts."""

from __future__ import annotations

import torch
from operator_cases import derivatives
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from mgd_kernels import functional


def test_each_pass_is_one_node_and_gives_the_bits_of_the_call():
    x = torch.randn(2, 3, 6, 8)
    function = lambda x: derivatives(lambda x: functional.avg_pool2d(x, 2), [x])
    module = make_fx(function)(x)
    module.graph.eliminate_dead_code()
    own = [str(node.target) for node in module.graph.nodes if "mgd_kernels" in str(node.target)]
    assert sorted(own) == sorted(2 * ["mgd_kernels.avg_pool2x2.default", "mgd_kernels.avg_spread2x2.default"])
    assert all(map(torch.equal, module(x), function(x)))


def test_layouts_of_inputs_and_cotangents_change_no_bit():
    x, g = torch.randn(3, 8, 6, 2).permute(0, 3, 2, 1), torch.randn(3, 4, 2, 3).permute(0, 2, 3, 1)
    found = []
    for a, b in ((x, g), (x.contiguous(), g.contiguous())):
        a = a.detach().requires_grad_()
        y = functional.avg_pool2d(a, (2, 2), (2, 2))
        found.append((y, *torch.autograd.grad(y, a, b)))
    assert all(map(torch.equal, *found))
    torch.testing.assert_close(found[0][0], nn.AvgPool2d(2)(x))
