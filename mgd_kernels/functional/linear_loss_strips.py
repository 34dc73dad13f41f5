"""Cross-entropy of a linear layer's outputs, which are never held: by strips of tokens, forward, backward and twice.

Names: h [n, d] hidden states, weight [V, d], bias [V], target int64 [n]; z = h weightᵀ + bias the logits of a strip, ż
their tangent. gl is the cotangent of losses [n]; gh, gw, gb, gz those of h, weight, bias, z; c, cw, cb those of gh,
gw, gb; ggl that of gl. With smoothing s, a factor ζ of the z-loss, and a cap k (0 for none):

    z' = k tanh(z/k)    p = softmax(z')    t = (1-s) onehot(target) + s/V    loss = lse(z') - t·z' + ζ lse(z')²

Between the products, `linear_loss_rows` computes, on a GPU Triton's kernels (`backends.triton_loss`). Products of size
n V d: 1 for the losses, 3 for the gradients, with or without the losses, 7 for the second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mgd_kernels.backends.triton_loss import TritonRows
from mgd_kernels.errors import BadArgument
from mgd_kernels.functional import _library
from mgd_kernels.functional._library import dense, like
from mgd_kernels.functional._team import Team, spans, team
from mgd_kernels.functional.linear_loss_rows import Rows

AnyRows = Rows | TritonRows

_STRIP = 1 << 22  # logits of a strip: 16 MiB in float32, unless _LEAST_ROWS rows have more
_LEAST_ROWS = 256  # with 128 the products of 50,000 columns took 1.2 times as long
_COLUMNS = 8192  # of the vocabulary, in one product
_STRIP_OF_GPU = 1 << 26  # 256 MiB: a guess, not measured


class _Layer:
    """The products of a strip with a weight matrix [V, d], by columns of the vocabulary."""

    def __init__(self, crew: Team, weight: Tensor):
        self.crew, self.weight = crew, weight
        self.columns = spans(len(weight), len(weight) if _library.on_gpu(weight) else _COLUMNS)

    def logits(self, h: Tensor, out: Tensor, *biases: Tensor | None) -> None:
        """h weightᵀ. The rows are of as many parts as there are biases, each with its own."""

        def some(c: slice) -> None:
            if all(bias is None for bias in biases):
                torch.mm(h, self.weight[c].t(), out=out[:, c])
                return
            for part, bias in zip(out[:, c].chunk(len(biases)), biases, strict=True):
                if bias is None:
                    part.zero_()
                else:
                    part.copy_(bias[c])
            out[:, c].addmm_(h, self.weight[c].t())

        self.crew.each(some, self.columns)

    def add_logits(self, h: Tensor, out: Tensor) -> None:
        self.crew.each(lambda c: out[:, c].addmm_(h, self.weight[c].t()), self.columns)

    def back(self, gz: Tensor) -> Tensor:
        """gz weight, added up in the order of the columns."""
        first, *rest = self.crew.each(lambda c: gz[:, c] @ self.weight[c], self.columns)
        for part in rest:
            first += part
        return first

    def add_weight_gradient(self, gw: Tensor, gz: Tensor, h: Tensor) -> None:
        self.crew.each(lambda c: gw[c].addmm_(gz[:, c].t(), h), self.columns)

    def add_bias_gradient(self, gb: Tensor, gz: Tensor) -> None:
        self.crew.each(lambda c: gb[c].add_(gz[:, c].sum(0)), self.columns)


def _strips(h: Tensor, weight: Tensor) -> list[slice]:
    strip = _STRIP_OF_GPU if _library.on_gpu(h) else _STRIP
    return spans(len(h), max(_LEAST_ROWS, strip // len(weight)))


def _rows(crew: Team, h: Tensor, weight: Tensor, target: Tensor, options: tuple) -> AnyRows:
    if _library.on_gpu(h):
        return TritonRows(target, len(weight), *options)
    return Rows(crew, target, len(weight), *options)


def _buffer(h: Tensor, weight: Tensor, count: int = 1) -> Tensor:
    """For `count` matrices of a strip."""
    return like(h, count * min(len(h), _strips(h, weight)[0].stop), len(weight))


def _check(h, weight, bias, target, *others: tuple[Tensor | None, tuple[int, ...]]) -> None:
    n, vocabulary = len(h), len(weight)
    expected = [(h, (n, weight.shape[1])), (weight, tuple(weight.shape)), (bias, (vocabulary,)), *others]
    for x, shape in expected:
        if x is not None and (x.dtype is not h.dtype or tuple(x.shape) != shape):
            raise BadArgument(f"expected {h.dtype} {list(shape)}; got {x.dtype} {list(x.shape)}")
    served = (torch.float32,) if _library.on_gpu(h) else (torch.float32, torch.float64)
    if h.dtype not in served:
        raise BadArgument(f"expected {' or '.join(map(str, served))}; got {h.dtype}")
    for x in (target, *(x for x, _ in expected)):
        if x is not None and x.device != h.device:
            raise BadArgument(f"expected tensors on {h.device}; got one on {x.device}")
    if target.dtype is not torch.int64 or target.shape != (n,):
        raise BadArgument(f"expected target int64 {[n]}; got {target.dtype} {list(target.shape)}")


def forward(h, weight, bias, target, *options):
    """losses, statistics [n, 2] of `linear_loss_rows`."""
    _check(h, weight, bias, target)
    h, weight, bias, target = dense(h, weight, bias, target)
    losses, statistics = like(h, len(h)), like(h, len(h), 2)
    with team(h.device) as crew:
        layer, buffer = _Layer(crew, weight), _buffer(h, weight)
        rows = _rows(crew, h, weight, target, options)
        for at in _strips(h, weight):
            z = buffer[: at.stop - at.start]
            layer.logits(h[at], z, bias)
            rows.forward(at, z, losses, statistics)
    return losses, statistics


def _parameter_gradients(h: Tensor, weight: Tensor, bias: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor]:
    """Zeros to add to; empty where they are not wanted."""
    gw = weight.new_zeros(weight.shape if wanted else 0)
    return gw, weight.new_zeros(len(weight) if wanted and bias is not None else 0)


def _gradients(h, weight, bias, target, parameters, options, put_gradient: Callable[[AnyRows, slice, Tensor], None]):
    """put_gradient(rows, at, z) puts gz in the place of z."""
    gh, (gw, gb) = like(h), _parameter_gradients(h, weight, bias, parameters)
    with team(h.device) as crew:
        layer, buffer = _Layer(crew, weight), _buffer(h, weight)
        rows = _rows(crew, h, weight, target, options)
        for at in _strips(h, weight):
            z = buffer[: at.stop - at.start]
            layer.logits(h[at], z, bias)
            put_gradient(rows, at, z)
            gh[at] = layer.back(z)
            if parameters:
                layer.add_weight_gradient(gw, z, h[at])
            if gb.numel():
                layer.add_bias_gradient(gb, z)
    return gh, gw, gb


def backward(gl, h, weight, bias, target, statistics, parameters, *options):
    """gh, gw, gb; the last two empty without `parameters`."""
    n = len(h)
    _check(h, weight, bias, target, (gl, (n,)), (statistics, (n, 2)))
    gl, h, weight, bias, target, statistics = dense(gl, h, weight, bias, target, statistics)
    work = lambda rows, at, z: rows.backward(at, z, gl, statistics)
    return _gradients(h, weight, bias, target, parameters, options, work)


def forward_backward(gl, h, weight, bias, target, parameters, *options):
    """losses, statistics, gh, gw, gb."""
    _check(h, weight, bias, target, (gl, (len(h),)))
    gl, h, weight, bias, target = dense(gl, h, weight, bias, target)
    losses, statistics = like(h, len(h)), like(h, len(h), 2)
    work = lambda rows, at, z: rows.forward_backward(at, z, gl, losses, statistics)
    return losses, statistics, *_gradients(h, weight, bias, target, parameters, options, work)


def double_backward(c, cw, cb, gl, h, weight, bias, target, statistics, parameters, *options):
    """ggl, and the cotangents of h, weight, bias."""
    n, vocabulary = len(h), len(weight)
    _check(
        h, weight, bias, target, (gl, (n,)), (statistics, (n, 2)), (c, tuple(h.shape)), (cw, tuple(weight.shape)),
        (cb, (vocabulary,)),
    )  # fmt: skip
    c, cw, cb, gl, h, weight, bias, target, statistics = dense(c, cw, cb, gl, h, weight, bias, target, statistics)
    ggl, gh, (gw, gb) = like(gl), like(h), _parameter_gradients(h, weight, bias, parameters)
    with team(h.device) as crew:
        layer, tangent = _Layer(crew, weight), None if cw is None else _Layer(crew, cw)
        buffer = _buffer(h, weight, 2)
        rows = _rows(crew, h, weight, target, options)
        for at in _strips(h, weight):
            count = at.stop - at.start
            z, ż = buffer[:count], buffer[count : 2 * count]
            # One product of twice the rows is quicker than two, for the logits and for the weight's gradient.
            if c is None:
                both, pair = h[at], z
                layer.logits(both, z, bias)
                ż.copy_(ż.new_zeros(1) if cb is None else cb)
            else:
                both, pair = torch.cat((h[at], c[at])), buffer[: 2 * count]
                layer.logits(both, pair, bias, cb)
            if tangent is not None:
                tangent.add_logits(h[at], ż)
            ggl[at] = rows.double_backward(at, z, ż, gl, statistics)  # z is now its own cotangent, and ż is gz
            gh[at] = layer.back(z)
            if tangent is not None:
                gh[at] += tangent.back(ż)
            if parameters:
                layer.add_weight_gradient(gw, pair, both)
            if gb.numel():
                layer.add_bias_gradient(gb, z)
    return ggl, gh, gw, gb
