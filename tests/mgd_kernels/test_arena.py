"""Views of flat buffers, wherever the buffer lies."""

import torch

from mgd_kernels import Arena


def arena() -> Arena:
    return Arena({"a": torch.zeros(3, 5), "b": torch.zeros(()), "c": torch.zeros(2, 0), "d": torch.zeros(40)})


def expected(layout: Arena, flat: torch.Tensor) -> list[torch.Tensor]:
    parts = zip(layout.offsets, layout.shapes, strict=True)
    return [flat[offset : offset + shape.numel()].reshape(shape) for offset, shape in parts]


def test_views_of_a_part_of_a_larger_buffer():
    layout = arena()
    whole = torch.arange(layout.numel + 10, dtype=torch.float32)
    flat = whole[7 : 7 + layout.numel]
    views = layout.slices(flat)
    assert all(map(torch.equal, views, expected(layout, flat)))
    views[0].add_(1)
    assert float(whole[7]) == 8


def test_views_of_every_second_element():
    layout = arena()
    flat = torch.arange(2 * layout.numel, dtype=torch.float32)[::2]
    assert all(map(torch.equal, layout.slices(flat), expected(layout, flat)))


def test_views_of_a_buffer_in_a_graph():
    layout = arena()
    flat = torch.randn(layout.numel, requires_grad=True)
    (gradient,) = torch.autograd.grad(sum(view.sum() for view in layout.slices(flat)), flat)
    assert float(gradient.sum()) == 3 * 5 + 1 + 40
