"""Attention whose matrix is never held: by strips of queries with all the keys that they see, three times.

Names: q [B, H, L, E], k [B, K, S, E] and v [B, K, S, D] with H a multiple of K, mask (boolean, or added to the scores)
that broadcasts to [B, H, L, S], o the output and g its cotangent; dq, dk, dv, dm cotangents of q, k, v, mask; cq, ck,
cv, cm the cotangents of these. With offset, query i sees the keys up to i + offset. One that sees none has output 0,
and the keys behind the last one that a strip sees are left out.
Z is what dropout multiplies with: 0 or 1/(1 - p), drawn again in every pass from the seed and the place of the strip.

    s = scale q kᵀ + mask    P = softmax(s)    o = (Z∘P) v    M = Z∘g vᵀ    dS = P∘(M - ⟨P M⟩)
    dq = scale dS k    dk = scale dSᵀ q    dv = (Z∘P)ᵀ g    dm = dS
    X = scale (cq kᵀ + q ckᵀ) + cm    R = P∘(X - ⟨P X⟩)    T = X∘(M - ⟨P M⟩) - M ⟨P X⟩ + Z∘g cvᵀ    U = P∘(T - ⟨P T⟩)
    cotangents: of g: (Z∘R) v + (Z∘P) cv    of v: (Z∘R)ᵀ g    of mask: U
                of q: scale (U k + dS ck)    of k: scale (Uᵀ q + dSᵀ cq)

⟨⟩ sums over keys. Rows of dS, R and U sum to 0, so that a constant vector may be taken from the keys and from ck: their
mean is. Keys with a large common part would lose X in rounding otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mgd_kernels.functional._library import dense, like, operator, twice
from mgd_kernels.functional._team import Team, spans, team
from mgd_kernels.functional.attention_rows import softmax_, softmax_backward_, softmax_double_backward_

_ROWS = 128  # of a strip: with 32 its products take three times as long
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio


class _Heads:
    """The query heads that share one head of keys and values, example b: what their strips have in common."""

    def __init__(
        self,
        b: int,
        kv: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        offset: int | None,
        seed: Tensor | None,
        dropout: float,
    ):
        group = q.shape[1] // k.shape[1]
        self.b, self.kv, self.heads = b, kv, range(kv * group, (kv + 1) * group)
        self.mask, self.scale, self.offset, self.dropout = mask, scale, offset, dropout
        self.seed = None if seed is None else int(seed) + b * q.shape[1]
        self.q, self.v, self.keys = q[b], v[b, kv], k.shape[2]
        self.weight = self._seen()
        self.k = self.centred(k)
        self._strips: dict[int, list[tuple[slice, int]]] = {}  # of heads, or of all by the first

    def _seen(self) -> Tensor | None:
        """Which keys some query sees; the others may hold anything. None: all."""
        if self.mask is None:
            return None
        part = _of(self.mask, self.b, self.heads[0])
        seen = _visible(part).any(0)
        return seen.expand(self.keys) if seen.any() else None

    def centred(self, k: Tensor) -> Tensor:
        own = k[self.b, self.kv]
        return own - (own if self.weight is None else own[self.weight]).mean(0)

    def strips(self, head: int) -> list[tuple[slice, int]]:
        own = head if self.mask is not None and self.mask.shape[1] > 1 else self.heads[0]
        if own not in self._strips:
            part = None if self.mask is None else _of(self.mask, self.b, own)
            self._strips[own] = _strips(self.q.shape[1], self.keys, self.offset, part)
        return self._strips[own]

    def drop_(self, x: Tensor, head: int, at: slice) -> Tensor:
        """x, of a strip, times Z, in its place."""
        return x if self.seed is None else x.mul_(_factors(x, self.seed + head, at, self.dropout))

    def probabilities(self, head: int, at: slice, n: int, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """The queries, scaled, and P of a strip."""
        q = self.q[head, at] * self.scale
        s = torch.mm(q, self.k[:n].t(), out=_matrix(buffer, len(q), n))
        if self.mask is not None:
            part = _strip_of(self.mask, self.b, head, at, n)
            if part.dtype is torch.bool:
                s.masked_fill_(~part, -torch.inf)
            else:
                s += part
        if self.offset is not None and n > (first := max(0, at.start + self.offset + 1)):
            edge = s[:, first:]  # row i of the strip sees the columns up to at.start + i + offset
            hidden = torch.ones_like(edge, dtype=torch.bool).triu_(at.start + self.offset + 1 - first)
            edge.masked_fill_(hidden, -torch.inf)
        if self.mask is None and (self.offset or 0) >= 0:
            return q, softmax_(s)
        blind = s.amax(1, keepdim=True) == -torch.inf
        if not blind.any():
            return q, softmax_(s)
        return q, softmax_(s.masked_fill_(blind, 0)).masked_fill_(blind, 0)


def _visible(mask: Tensor) -> Tensor:
    """Where a mask hides nothing; what it holds as NaN, neither."""
    return mask if mask.dtype is torch.bool else mask != -torch.inf


def _strips(rows: int, keys: int, offset: int | None, mask: Tensor | None) -> list[tuple[slice, int]]:
    """Rows, and the number of keys up to the last one that they see; not those that see none. mask: of one head."""
    found = []
    for at in spans(rows, _ROWS):
        n = keys if offset is None else min(keys, at.stop + offset)
        if mask is not None and mask.shape[1] == keys and n > 0:
            part = mask if mask.shape[0] == 1 else mask[at]
            seen = _visible(part[:, :n]).any(0).nonzero()
            n = int(seen[-1]) + 1 if len(seen) else 0
        if n > 0:
            found.append((at, n))
    return found


def _factors(like: Tensor, seed: int, at: slice, dropout: float) -> Tensor:
    """Z of a strip, of one matrix's seed: the same in every pass, whichever thread asks."""
    # Torch's generator takes 32 bits. Multiples of the golden ratio spread seeds and places over them.
    mixed = ((seed * _GOLDEN + at.start // _ROWS + 1) * _GOLDEN >> 32) & 0xFFFFFFFF
    generator = torch.Generator().manual_seed(mixed)
    kept = torch.empty(like.shape, dtype=torch.float32).bernoulli_(1 - dropout, generator=generator)
    return kept.to(like.dtype).div_(1 - dropout)  # drawn alike in both dtypes


def _of(x: Tensor, b: int, head: int) -> Tensor:
    """The matrix of one head, of a tensor that broadcasts."""
    return x[b if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0]


def _strip_of(x: Tensor, b: int, head: int, at: slice, n: int) -> Tensor:
    """Its rows `at` and first n columns, or what broadcasts to them."""
    part = _of(x, b, head)
    return (part if part.shape[0] == 1 else part[at])[:, : n if part.shape[1] > 1 else 1]


def _matrix(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


def _workspace(q: Tensor, k: Tensor, count: int) -> list[Tensor]:
    return [q.new_empty(min(_ROWS, q.shape[2]) * k.shape[2]) for _ in range(count)]


def _add_to_mask(dm: Tensor, b: int, head: int, at: slice, d: Tensor) -> None:
    """Adds d, of a strip, to the cotangent of a mask, summed where it was broadcast."""
    part = _strip_of(dm, b, head, at, d.shape[1])
    part += d.sum_to_size(part.shape)


def _each(crew: Team, work: Callable[[tuple[int, int]], None], q: Tensor, k: Tensor, dm: Tensor) -> None:
    """work((b, head of keys)), one after the other where several add to the same cotangent of the mask."""
    pieces = [(b, kv) for b in range(k.shape[0]) for kv in range(k.shape[1])]
    if dm.numel() and dm.shape[:2] != q.shape[:2]:
        for piece in pieces:
            work(piece)
    else:
        crew.each(work, pieces)


def _attention(q, k, v, mask, *options):
    q, k, v = dense(q, k, v)
    o = q.new_zeros(*q.shape[:3], v.shape[3])

    def work(piece: tuple[int, int]) -> None:
        heads, (buffer,) = _Heads(*piece, q, k, v, mask, *options), _workspace(q, k, 1)
        for head in heads.heads:
            for at, n in heads.strips(head):
                _, p = heads.probabilities(head, at, n, buffer)
                torch.mm(heads.drop_(p, head, at), heads.v[:n], out=o[heads.b, head, at])

    with team() as crew:
        _each(crew, work, q, k, q.new_empty(0))
    return o


def _backward(g, q, k, v, mask, mask_gradient, scale, *options):
    g, q, k, v = dense(g, q, k, v)
    dq, dk, dv, dm = _zeros(q, k, v, mask, mask_gradient)

    def work(piece: tuple[int, int]) -> None:
        heads, (first, second) = _Heads(*piece, q, k, v, mask, scale, *options), _workspace(q, k, 2)
        shared = _Shared(k, v, len(heads.heads))
        for head in heads.heads:
            dkt, dvt = _transposed(k), _transposed(v)
            for at, n in heads.strips(head):
                rows, p = heads.probabilities(head, at, n, first)
                cotangent = g[heads.b, head, at]
                ds = torch.mm(cotangent, heads.v[:n].t(), out=_matrix(second, len(rows), n))
                softmax_backward_(p, heads.drop_(ds, head, at))
                torch.mm(ds, heads.k[:n], out=dq[heads.b, head, at]).mul_(scale)
                dkt[:, :n].addmm_(rows.t(), ds)
                dvt[:, :n].addmm_(cotangent.t(), heads.drop_(p, head, at))
                if mask_gradient:
                    _add_to_mask(dm, heads.b, head, at, ds)
            shared.set(head, dkt, dvt)
        shared.write(dk[piece], dv[piece])

    with team() as crew:
        _each(crew, work, q, k, dm)
    return dq, dk, dv, dm


def _double_backward(cq, ck, cv, cm, g, q, k, v, mask, mask_gradient, scale, *options):
    cq, ck, cv, g, q, k, v = dense(cq, ck, cv, g, q, k, v)
    gg = torch.zeros_like(g)
    dq, dk, dv, dm = _zeros(q, k, v, mask, mask_gradient)
    cq, ck = torch.zeros_like(q) if cq is None else cq, torch.zeros_like(k) if ck is None else ck

    def work(piece: tuple[int, int]) -> None:
        heads, buffers = _Heads(*piece, q, k, v, mask, scale, *options), _workspace(q, k, 4)
        ckc = heads.centred(ck)
        both = torch.cat([ckc, heads.k], 1)  # of one product, which is faster than two
        shared = _Shared(k, v, len(heads.heads))
        for head in heads.heads:
            dkt, dvt = _transposed(k), _transposed(v)
            for at, n in heads.strips(head):
                rows, p = heads.probabilities(head, at, n, buffers[0])
                m, x, ds = (_matrix(buffer, len(rows), n) for buffer in buffers[1:])
                cotangent, tangent = g[heads.b, head, at], cq[heads.b, head, at] * scale
                torch.mm(torch.cat([rows, tangent], 1), both[:n].t(), out=x)
                if cm is not None:
                    x += _strip_of(cm, heads.b, head, at, n)
                heads.drop_(torch.mm(cotangent, heads.v[:n].t(), out=m), head, at)
                softmax_backward_(p, ds.copy_(m))
                softmax_double_backward_(p, x, m)  # now R, and T but for its last term
                out = gg[heads.b, head, at]
                torch.mm(heads.drop_(x, head, at), heads.v[:n], out=out)
                if cv is not None:
                    if heads.seed is None:
                        m.addmm_(cotangent, cv[piece][:n].t())
                    else:
                        m += heads.drop_(torch.mm(cotangent, cv[piece][:n].t()), head, at)
                softmax_backward_(p, m)  # now U
                torch.mm(m, heads.k[:n], out=dq[heads.b, head, at]).addmm_(ds, ckc[:n]).mul_(scale)
                dkt[:, :n].addmm_(rows.t(), m).addmm_(tangent.t(), ds)
                dvt[:, :n].addmm_(cotangent.t(), x)
                if mask_gradient:
                    _add_to_mask(dm, heads.b, head, at, m)
                if cv is not None:
                    out.addmm_(heads.drop_(p, head, at), cv[piece][:n])
            shared.set(head, dkt, dvt)
        shared.write(dk[piece], dv[piece])

    with team() as crew:
        _each(crew, work, q, k, dm)
    return gg, dq, dk, dv, dm


class _Shared:
    """Cotangents of the keys and values that `count` heads share: each head's own, and then their sum, which has the
    bits of keys that were repeated for each head."""

    def __init__(self, k: Tensor, v: Tensor, count: int):
        self._own = [x.new_empty(count, *x.shape[2:]) for x in (k, v)]

    def set(self, head: int, *transposed: Tensor) -> None:
        for own, x in zip(self._own, transposed, strict=True):
            own[head % len(own)] = x.t()

    def write(self, *out: Tensor) -> None:
        for own, x in zip(self._own, out, strict=True):
            torch.sum(own, 0, out=x)


def _transposed(x: Tensor) -> Tensor:
    """Zeros for the cotangent of one head, which products add to: transposed, they are faster."""
    return x.new_zeros(x.shape[3], x.shape[2])


def _zeros(q, k, v, mask, mask_gradient) -> list[Tensor]:
    return [q.new_zeros(x.shape if wanted else 0) for x, wanted in ((q, 1), (k, 1), (v, 1), (mask, mask_gradient))]


def _differentiate(ctx, g):
    if g is None:
        return (None,) * 8
    q, k, v, mask, seed = ctx.saved_tensors
    wanted = mask is not None and ctx.needs_input_grad[4]  # the first is the dispatcher's
    scale, offset, _, dropout = ctx.arguments[4:]
    dq, dk, dv, dm = attention_backward(g, q, k, v, mask, wanted, scale, offset, seed, dropout)
    return dq, dk, dv, dm if wanted else None, None, None, None, None


def _differentiate_twice(ctx, cq, ck, cv, cm):
    mask_gradient = ctx.arguments[5]
    cm = cm if mask_gradient else None
    if cq is None and ck is None and cv is None and cm is None:
        return (None,) * 10
    g, q, k, v, mask, seed = ctx.saved_tensors
    wanted = mask is not None and ctx.needs_input_grad[5]
    scale, offset, _, dropout = ctx.arguments[6:]
    given = cq, ck, cv, cm, g, q, k, v, mask
    *found, dm = attention_double_backward(*given, wanted, scale, offset, seed, dropout)
    return *found, dm if wanted else None, *[None] * 5


def plain_attention(q, k, v, mask, scale, offset, seed, dropout, factors=None) -> Tensor:
    """The same in torch's operators, with the matrix in memory. factors: Z, where it is not drawn from the seed."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = scale * (q @ k.transpose(2, 3))
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else s + mask
    if offset is not None:
        s = s.masked_fill(torch.ones(s.shape[2:], dtype=torch.bool, device=s.device).triu(offset + 1), -torch.inf)
    blind = (s == -torch.inf).all(-1, keepdim=True)
    p = s.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    if seed is not None:
        factors = _all_factors(p, seed, offset, dropout, mask)
    return (p if factors is None else p * factors) @ v


def _all_factors(p: Tensor, seed: Tensor, offset: int | None, dropout: float, mask: Tensor | None) -> Tensor:
    z = torch.zeros_like(p, requires_grad=False)
    for i, matrix in enumerate(z.view(-1, *z.shape[2:])):
        part = None if mask is None else _of(mask, *divmod(i, z.shape[1]))
        for at, n in _strips(matrix.shape[0], matrix.shape[1], offset, part):
            matrix[at, :n] = _factors(matrix[at, :n], int(seed) + i, at, dropout)
    return z


def plain_double_backward(attention, cq, ck, cv, cm, g, q, k, v, mask, mask_gradient, *options):
    """By autograd through `attention(q, k, v, mask, *options)`."""
    added = None if mask is None or mask.dtype is torch.bool else mask

    def function(q, k, v, added):
        return attention(q, k, v, mask if added is None else added, *options)

    *found, dm = twice(function, [q, k, v, added], [g], [cq, ck, cv, cm])
    return *found, dm if mask_gradient else q.new_zeros(0)


def empty_cotangents(q, k, v, mask, mask_gradient):
    return like(q), like(k), like(v), like(mask) if mask_gradient else q.new_empty(0)


_OPTIONS = "float scale, SymInt? offset, Tensor? seed, float dropout"

attention = operator(
    f"attention(Tensor q, Tensor k, Tensor v, Tensor? mask, {_OPTIONS}) -> Tensor",
    _attention,
    lambda q, k, v, *_: q.new_empty(*q.shape[:3], v.shape[3]),
    lambda args, o: (*args[:4], args[6]),
    _differentiate,
)
attention_backward = operator(
    f"attention_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? mask, bool mask_gradient, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda g, q, k, v, mask, mask_gradient, *_: empty_cotangents(q, k, v, mask, mask_gradient),
    lambda args, out: (*args[:5], args[8]),
    _differentiate_twice,
)
attention_double_backward = operator(
    "attention_double_backward(Tensor? cq, Tensor? ck, Tensor? cv, Tensor? cm, Tensor g, Tensor q, Tensor k, Tensor v,"
    f" Tensor? mask, bool mask_gradient, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _double_backward,
    lambda cq, ck, cv, cm, g, *given: (like(g), *empty_cotangents(*given[:5])),
    plain=functools.partial(plain_double_backward, plain_attention),
)
