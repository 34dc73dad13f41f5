"""Cross-entropy of a linear layer's outputs, which are never held: by strips of tokens, forward, backward and twice.

Names: h [n, d] hidden states, weight [V, d], bias [V], target int64 [n]; z = h weightᵀ + bias the logits of a strip, ż
their tangent. gl is the cotangent of losses [n]; gh, gw, gb, gz those of h, weight, bias, z; c, cw, cb those of gh,
gw, gb; ggl that of gl. With smoothing s, a factor ζ of the z-loss, and a cap k (0 for none):

    z' = k tanh(z/k)    p = softmax(z')    t = (1-s) onehot(target) + s/V    loss = lse(z') - t·z' + ζ lse(z')²

Between the products, `linear_loss_rows` computes. Products of size n V d: 1 forward, 3 backward, 7 twice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_kernels.errors import BadArgument
from mgd_kernels.functional._library import dense, like, operator, served_by_products, twice
from mgd_kernels.functional._team import Team, spans, team
from mgd_kernels.functional.linear_loss_rows import Rows

_STRIP = 1 << 22  # logits of a strip: 16 MiB in float32, unless _LEAST_ROWS rows have more
_LEAST_ROWS = 256  # with 128 the products of 50,000 columns took 1.2 times as long
_COLUMNS = 8192  # of the vocabulary, in one product


class _Layer:
    """The products of a strip with a weight matrix [V, d], by columns of the vocabulary."""

    def __init__(self, crew: Team, weight: Tensor):
        self.crew, self.weight, self.columns = crew, weight, spans(len(weight), _COLUMNS)

    def logits(self, h: Tensor, bias: Tensor | None, out: Tensor) -> None:
        def some(c: slice) -> None:
            if bias is None:
                torch.mm(h, self.weight[c].t(), out=out[:, c])
            else:
                torch.addmm(bias[c], h, self.weight[c].t(), out=out[:, c])

        self.crew.each(some, self.columns)

    def add_logits(self, h: Tensor, out: Tensor) -> None:
        self.crew.each(lambda c: out[:, c].addmm_(h, self.weight[c].t()), self.columns)

    def back(self, gz: Tensor) -> Tensor:
        """gz weight, added up in the order of the columns."""
        first, *rest = self.crew.each(lambda c: gz[:, c] @ self.weight[c], self.columns)
        for part in rest:
            first += part
        return first

    def add_weight_gradient(self, gw: Tensor, gb: Tensor, gz: Tensor, h: Tensor) -> None:
        def some(c: slice) -> None:
            gw[c].addmm_(gz[:, c].t(), h)
            if gb.numel():
                gb[c] += gz[:, c].sum(0)

        self.crew.each(some, self.columns)


def _strips(h: Tensor, weight: Tensor) -> list[slice]:
    return spans(len(h), max(_LEAST_ROWS, _STRIP // len(weight)))


def _buffers(h: Tensor, weight: Tensor, count: int) -> list[Tensor]:
    rows = min(len(h), _strips(h, weight)[0].stop)
    return [like(h, rows, len(weight)) for _ in range(count)]


def _check(h, weight, bias, target, *others: tuple[Tensor | None, tuple[int, ...]]) -> None:
    n, vocabulary = len(h), len(weight)
    expected = [(h, (n, weight.shape[1])), (weight, tuple(weight.shape)), (bias, (vocabulary,)), *others]
    for x, shape in expected:
        if x is not None and (x.dtype is not h.dtype or tuple(x.shape) != shape):
            raise BadArgument(f"expected {h.dtype} {list(shape)}; got {x.dtype} {list(x.shape)}")
    if h.dtype not in (torch.float32, torch.float64):
        raise BadArgument(f"expected float32 or float64; got {h.dtype}")
    if target.dtype is not torch.int64 or target.shape != (n,):
        raise BadArgument(f"expected target int64 {[n]}; got {target.dtype} {list(target.shape)}")


def _linear_cross_entropy(h, weight, bias, target, ignore_index, smoothing, z_loss, cap):
    _check(h, weight, bias, target)
    h, weight, bias, target = dense(h, weight, bias, target)
    losses, statistics = like(h, len(h)), like(h, len(h), 2)
    with team() as crew:
        layer, (buffer,) = _Layer(crew, weight), _buffers(h, weight, 1)
        rows = Rows(crew, target, len(weight), ignore_index, smoothing, z_loss, cap)
        for at in _strips(h, weight):
            z = buffer[: at.stop - at.start]
            layer.logits(h[at], bias, z)
            rows.forward(at, z, losses, statistics)
    return losses, statistics


def _parameter_gradients(h: Tensor, weight: Tensor, bias: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor]:
    """Zeros to add to; empty where they are not wanted."""
    gw = weight.new_zeros(weight.shape if wanted else 0)
    return gw, weight.new_zeros(len(weight) if wanted and bias is not None else 0)


def _backward(gl, h, weight, bias, target, statistics, parameters, ignore_index, smoothing, z_loss, cap):
    n = len(h)
    _check(h, weight, bias, target, (gl, (n,)), (statistics, (n, 2)))
    gl, h, weight, bias, target, statistics = dense(gl, h, weight, bias, target, statistics)
    gh, (gw, gb) = like(h), _parameter_gradients(h, weight, bias, parameters)
    with team() as crew:
        layer, (buffer,) = _Layer(crew, weight), _buffers(h, weight, 1)
        rows = Rows(crew, target, len(weight), ignore_index, smoothing, z_loss, cap)
        for at in _strips(h, weight):
            z = buffer[: at.stop - at.start]
            layer.logits(h[at], bias, z)
            rows.backward(at, z, gl, statistics, gz=z)
            gh[at] = layer.back(z)
            if parameters:
                layer.add_weight_gradient(gw, gb, z, h[at])
    return gh, gw, gb


def _double_backward(
    c, cw, cb, gl, h, weight, bias, target, statistics, parameters, ignore_index, smoothing, z_loss, cap
):
    n, vocabulary = len(h), len(weight)
    _check(
        h, weight, bias, target, (gl, (n,)), (statistics, (n, 2)), (c, tuple(h.shape)), (cw, tuple(weight.shape)),
        (cb, (vocabulary,)),
    )  # fmt: skip
    c, cw, cb, gl, h, weight, bias, target, statistics = dense(c, cw, cb, gl, h, weight, bias, target, statistics)
    ggl, gh, (gw, gb) = like(gl), like(h), _parameter_gradients(h, weight, bias, parameters)
    with team() as crew:
        layer, tangent = _Layer(crew, weight), None if cw is None else _Layer(crew, cw)
        buffers = _buffers(h, weight, 3)
        rows = Rows(crew, target, vocabulary, ignore_index, smoothing, z_loss, cap)
        for at in _strips(h, weight):
            z, ż, gz = (buffer[: at.stop - at.start] for buffer in buffers)
            layer.logits(h[at], bias, z)
            if c is not None:
                layer.logits(c[at], cb, ż)
            else:
                ż.copy_(ż.new_zeros(1) if cb is None else cb)
            if tangent is not None:
                tangent.add_logits(h[at], ż)
            ggl[at] = rows.double_backward(at, z, ż, gl, statistics, gz=gz)  # z is now its own cotangent
            gh[at] = layer.back(z)
            if tangent is not None:
                gh[at] += tangent.back(gz)
            if parameters:
                layer.add_weight_gradient(gw, gb, z, h[at])
                if c is not None:
                    layer.add_weight_gradient(gw, gb[:0], gz, c[at])
    return ggl, gh, gw, gb


def _differentiate(ctx, gl, _statistics):
    if gl is None:
        return (None,) * 8
    h, weight, bias, target, statistics = ctx.saved_tensors
    parameters = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]  # the first is the dispatcher's
    gh, gw, gb = linear_cross_entropy_backward(gl, h, weight, bias, target, statistics, parameters, *ctx.arguments[4:])
    return gh, gw if parameters else None, gb if parameters and bias is not None else None, *(None,) * 5


def _differentiate_twice(ctx, c, cw, cb):
    gl, h, weight, bias, target, statistics = ctx.saved_tensors
    parameters, *options = ctx.arguments[6:]
    if not parameters:
        cw = cb = None
    if bias is None:
        cb = None
    if c is None and cw is None and cb is None:
        return (None,) * 11
    wanted = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    ggl, gh, gw, gb = linear_cross_entropy_double_backward(
        c, cw, cb, gl, h, weight, bias, target, statistics, wanted, *options
    )
    return ggl, gh, gw if wanted else None, gb if wanted and bias is not None else None, *(None,) * 7


def plain(h, weight, bias, target, ignore_index, smoothing, z_loss, cap) -> Tensor:
    """The losses, in torch's operators."""
    z = F.linear(h, weight, bias)
    if cap:
        z = cap * torch.tanh(z / cap)
    losses = F.cross_entropy(z, target, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing)
    if z_loss:
        losses = losses + z_loss * (z.logsumexp(-1).square() * (target != ignore_index))
    return losses


def _plain_double_backward(c, cw, cb, gl, h, weight, bias, target, _statistics, parameters, *options):
    function = lambda h, weight, bias: plain(h, weight, bias, target, *options)
    ggl, gh, gw, gb = twice(function, [h, weight, bias], [gl], [c, cw, cb])
    empty = weight.new_zeros(0)
    return ggl, gh, gw if parameters else empty, gb if parameters and gb is not None else empty


def _empty_gradients(h, weight, bias, parameters):
    gw = like(weight) if parameters else weight.new_empty(0)
    return like(h), gw, like(bias) if parameters and bias is not None else weight.new_empty(0)


_OPTIONS = "int ignore_index, float smoothing, float z_loss, float cap"

linear_cross_entropy_forward = operator(
    f"linear_cross_entropy(Tensor h, Tensor weight, Tensor? bias, Tensor target, {_OPTIONS}) -> (Tensor, Tensor)",
    _linear_cross_entropy,
    lambda h, *_: (like(h, h.shape[0]), like(h, h.shape[0], 2)),
    lambda args, out: (*args[:4], out[1]),
    _differentiate,
    non_differentiable=slice(1, 2),
)
linear_cross_entropy_backward = operator(
    "linear_cross_entropy_backward(Tensor gl, Tensor h, Tensor weight, Tensor? bias, Tensor target, Tensor statistics,"
    f" bool parameters, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda gl, h, weight, bias, target, statistics, parameters, *_: _empty_gradients(h, weight, bias, parameters),
    lambda args, out: args[:6],
    _differentiate_twice,
)
linear_cross_entropy_double_backward = operator(
    "linear_cross_entropy_double_backward(Tensor? c, Tensor? cw, Tensor? cb, Tensor gl, Tensor h, Tensor weight,"
    f" Tensor? bias, Tensor target, Tensor statistics, bool parameters, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _double_backward,
    lambda c, cw, cb, gl, h, weight, bias, target, statistics, parameters, *_: (
        like(gl),
        *_empty_gradients(h, weight, bias, parameters),
    ),
    plain=_plain_double_backward,
)


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """`F.cross_entropy(F.linear(input, weight, bias), target)` without the logits: input `[..., d]`, weight `[V, d]`,
    target int64 `[...]`, bias `[V]`.

    z_loss: adds `z_loss * logsumexp(logits)²` to each loss. softcap: the logits are `softcap * tanh(logits / softcap)`.
    reduction: "mean" (over targets that are not ignored), "sum", or "none", which has the shape of target, so that each
    token can be weighted. By strips of tokens in float32 and float64 on the CPU; elsewhere in torch's operators.
    """
    _check_arguments(input, weight, target, bias, reduction, label_smoothing, z_loss, softcap)
    h, rows = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    options = ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0)
    if served_by_products(h, weight, bias) and rows.dtype is torch.int64 and rows.device.type == "cpu":
        losses, _ = linear_cross_entropy_forward(h, weight, bias, rows, *options)
    else:
        losses = plain(h, weight, bias, rows, *options)
    if reduction == "none":
        return losses.view(target.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (rows != ignore_index).sum()


def _check_arguments(input, weight, target, bias, reduction, label_smoothing, z_loss, softcap) -> None:
    def expect(fine: bool, what: str, got: object) -> None:
        if not fine:
            raise BadArgument(f"linear_cross_entropy: expected {what}; got {got}")

    expect(weight.ndim == 2, "weight [V, d]", list(weight.shape))
    vocabulary, width = weight.shape
    expect(
        input.ndim > 0 and input.shape[-1] == width,
        f"input [..., {width}], as wide as weight",
        list(input.shape),
    )
    expect(bias is None or bias.shape == (vocabulary,), f"bias [{vocabulary}]", bias is not None and list(bias.shape))
    expect(
        not target.is_floating_point() and target.shape == input.shape[:-1],
        f"target: class indices {list(input.shape[:-1])}",
        f"{target.dtype} {list(target.shape)}",
    )
    expect(reduction in ("mean", "sum", "none"), 'reduction "mean", "sum" or "none"', repr(reduction))
    expect(0 <= label_smoothing <= 1, "label_smoothing in [0, 1]", label_smoothing)
    expect(z_loss >= 0, "z_loss >= 0", z_loss)
    expect(softcap is None or softcap > 0, "softcap > 0, or None for no cap", softcap)
