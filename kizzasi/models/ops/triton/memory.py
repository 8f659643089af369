"""Matrix memories in Triton, on CUDA: the one recurrence of matrix_memory.py; symbols as there.

Chunk by chunk, with matrix products (the WY form where there is a lookup). scores.py says what the
tokens of a chunk see of each other: A, with queries and keys faded to the chunk's ends, Q and K.
With S the memory that enters a chunk, all in rows of tokens and indexed [key, value],

    u = T (A_ak v + Q_a S),     T = (1 - A_ab)^-1,     y = A_qk v + A_qb u + Q_q S
    S' = fade S + K_k^T v + K_b^T u

and the adjoint, with dS' for dS and g for what the right side of u's system gets, is the same walk
the other way:

    g = T^T (A_qb^T dy + K_b dS'),     dv = A_qk^T dy + A_ak^T g + K_k dS'
    dS = fade dS' + Q_q^T dy + Q_a^T g

Between forward and backward only inputs, u and the memories that enter chunks are kept; the rest is
made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kizzasi.models.ops import autodiff
from kizzasi.models.ops.matrix_memory import How, MatrixMemory
from kizzasi.models.ops.precision import LOW_PRECISION, without_autocast
from kizzasi.models.ops.triton import launch
from kizzasi.models.ops.triton.first_use import proven
from kizzasi.models.ops.triton.products import summed_products, walk
from kizzasi.models.ops.triton.scores import scores_backward, scores_forward, solved

CHUNK, CHUNK_OF_LOOKUPS = 64, 32  # tokens, powers of two
VALUES, KEYS = 64, 32  # channels that a program holds at a time
MOST = 2**13  # numbers of S in a program


class Sizes(NamedTuple):
    """b, t, h, n, m as everywhere; c tokens in each of z chunks."""

    b: int
    t: int
    h: int
    n: int
    m: int
    c: int
    z: int


class Operand(NamedTuple):
    """A matrix for every chunk of every head: strides of batch row, head, chunk, row, column."""

    x: Tensor
    strides: tuple[int, ...]

    @property
    def T(self) -> Operand:
        *outer, rows, columns = self.strides
        return Operand(self.x, (*outer, columns, rows))


class Problem(NamedTuple):
    """One call: streams, and what the kernels are compiled for.

    q, k (b, t, g, n), v (b, t, h, m), w with dimensions of 1, a, b (b, t, h, n) or q, starts.
    """

    streams: tuple[Tensor, ...]
    sizes: Sizes
    lookup: bool
    flags: dict[str, Any]
    precision: str

    @property
    def scores(self) -> dict[str, Any]:
        c, n = self.sizes.c, self.sizes.n
        own = {"LEVELS": c.bit_length() - 1, "C": c, "BN": launch.block(n, KEYS, 16)}
        return {**self.flags, **own, "PRECISION": self.precision}

    @property
    def numbers(self) -> list[int]:
        q, k, _, w, a, b, _ = self.streams
        _, t, h, n, _, _, _ = self.sizes
        return [t, h, n, h // q.shape[2], *launch.strides(q, k, a, b, w)]

    def tokens(self, x: Tensor) -> Operand:
        """x (b, t, h, ..)."""
        b, t, h, last = x.stride()
        return Operand(x, (b, h, self.sizes.c * t, t, last))

    def inner(self, x: Tensor) -> Operand:
        """x (b h, z, .., ..)."""
        item, *rest = x.stride()
        return Operand(x, (self.sizes.h * item, item, *rest))


def _run(low: bool, how: How, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    *streams, s0, starts = given
    assert s0 is not None
    rows = [None if x is None else launch.rows(x) for x in streams]
    ready = (*rows, s0, None if starts is None else starts.contiguous())
    precision = launch.precision(s0.dtype, low)
    if launch.differentiable(*ready[:-1]):
        return _Memory.apply(how, precision, *ready)
    y, last, _, _ = _forward(how, precision, ready)
    return y, last


def _problem(how: How, precision: str, given: Sequence[Any]) -> Problem:
    q, k, v, w, a, b, _, starts = given
    (batch, t, h, m), n = v.shape, q.shape[-1]
    most = CHUNK if a is None else CHUNK_OF_LOOKUPS
    c = launch.block(t, most, 16)
    flags = {"LOOKUP": a is not None, "EARLY": how.early, "ONE": w.shape[-1] == 1}
    packed = q if starts is None else starts.view(torch.uint8)
    streams = (q, k, v, w, *(q if x is None else x for x in (a, b)), packed)
    sizes = Sizes(batch, t, h, n, m, c, launch.blocks(t, c))
    flags["PACKED"] = starts is not None
    return Problem(streams, sizes, a is not None, flags, precision)


class Pieces(NamedTuple):
    """A (4; b h, z, c, c), seen (4; b h, z, c, n), fade (b h, z, n or 1): of scores.py. T (3; b h,
    z, c, c) of `solved`; without a lookup A and seen have fewer parts, and T none."""

    A: Tensor
    seen: Tensor
    fade: Tensor
    T: Tensor


def _pieces(p: Problem) -> Pieces:
    q, k, v, w, a, b, starts = p.streams
    (batch, _, h, n, _, c, z), pairs = p.sizes, 4 if p.lookup else 1
    A = v.new_empty(pairs, batch * h, z, c, c)
    seen = v.new_empty(4 if p.lookup else 2, batch * h, z, c, n)
    fade = v.new_empty(batch * h, z, w.shape[-1])
    given = (q, k, a, b, w, starts, A, seen, fade, *p.numbers)
    launch.run(scores_forward, (batch * h, z), *given, **p.scores)
    T = v.new_empty(3 if p.lookup else 0, *A.shape[1:])
    if p.lookup:
        exact = {"PRECISION": launch.precision(v.dtype, False)}  # errors of T grow with each row
        options = {**{name: p.scores[name] for name in ("LEVELS", "C")}, **exact}
        launch.run(solved, (batch * h, z), A, T, **options)
    return Pieces(A, seen, fade, T)


def _summed(p: Problem, out: Operand, *terms: tuple[Operand, Operand, int], wide: int) -> Tensor:
    """The sum of products x y, each with the width of x, into out, of that many columns; 0 where
    they are tokens."""
    *_, c, z = p.sizes
    full = [*terms, *[terms[0]] * (3 - len(terms))]
    tensors = [operand.x for x, y, _ in full for operand in (x, y)]
    widths = [width for *_, width in full]
    strides = [s for x, y, _ in full for operand in (x, y) for s in operand.strides]
    bc = launch.block(wide or c, VALUES, 16)
    grid = (p.sizes.b * p.sizes.h, z, launch.blocks(wide or c, bc))
    bk = launch.block(max(width or c for width in widths), 32, 16)
    sizes = [p.sizes.t, p.sizes.h, *widths, wide]
    options = {"TERMS": len(terms), "C": c, "BC": bc, "BK": bk, "PRECISION": p.precision}
    launch.run(summed_products, grid, *tensors, out.x, *sizes, *strides, *out.strides, **options)
    return out.x


def _walked(
    p: Problem, s0: Tensor, fade: Tensor, write: Tensor, v: Tensor, *lookup: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """lookup: forget, reader, own, or nothing. What enters each chunk (b h, z, n, m), what comes
    out at the end (b h, n, m), and u, which is own where there is no lookup."""
    b, t, h, n, m, c, z = p.sizes
    memory, last = v.new_empty(b * h, z, n, m), v.new_empty(b * h, n, m)
    forget, reader, own = lookup or (write, write, v)
    u = torch.empty_like(own) if lookup else v
    width = launch.block(n, n, 16)
    bm = launch.block(m, max(16, min(VALUES, MOST // width)), 16)
    numbers = [t, h, n, m, z, *launch.strides(v)]
    options = {"LOOKUP": bool(lookup), "ONE": fade.shape[-1] == 1, "REVERSE": reverse}
    options |= {"C": c, "N": width, "BM": bm, "PRECISION": p.precision}
    tensors = (s0, fade, write, v, forget, reader, own, u, memory, last)
    launch.run(walk, (b * h, launch.blocks(m, bm)), *tensors, *numbers, **options)
    return memory, last, u


def _forward(
    how: How, precision: str, given: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the last S, the memories that enter chunks, and u."""
    p, s0 = _problem(how, precision, given), given[6]
    (b, _, h, n, m, c, z), v = p.sizes, p.streams[2]
    A, seen, fade, T = _pieces(p)
    start = (s0 if how.key_first else s0.mT).flatten(0, 1).contiguous()
    lookup = ()
    value = p.tokens(v)
    if p.lookup:
        own, reader = v.new_empty(b * h, z, c, m), torch.empty_like(seen[0])
        _summed(p, p.inner(own), (p.inner(T[1]), value, 0), wide=m)
        _summed(p, p.inner(reader), (p.inner(T[0]), p.inner(seen[2]), 0), wide=n)
        lookup = seen[3], reader, own
    memory, last, u = _walked(p, start, fade, seen[1], v, *lookup, reverse=False)
    terms = [(p.inner(A[0]), value, 0), (p.inner(seen[0]), p.inner(memory), n)]
    if p.lookup:
        terms.append((p.inner(A[1]), p.inner(u), 0))
    y = _summed(p, p.tokens(v.new_empty(v.shape)), *terms, wide=m)
    return y, _shaped(how, last, s0), memory, u


def _shaped(how: How, last: Tensor, like: Tensor) -> Tensor:
    last = last.unflatten(0, like.shape[:2])
    return last if how.key_first else last.mT


def _score_gradients(
    p: Problem, dy: Tensor, g: Tensor, u: Tensor, memory: Tensor, dmemory: Tensor, pieces: Pieces
) -> tuple[Tensor, ...]:
    """dq, dk, dw, da, db, of heads of their own, the last two of no use without a lookup."""
    q, k, v, w, a, b, starts = p.streams
    batch, t, h, n, m, _, z = p.sizes
    A, seen, fade, _ = pieces
    out, value, S, dS = p.tokens(dy), p.tokens(v), p.inner(memory), p.inner(dmemory)
    dA, dseen = torch.empty_like(A), torch.empty_like(seen)
    _summed(p, p.inner(dA[0]), (out, value.T, m), wide=0)
    _summed(p, p.inner(dseen[0]), (out, S.T, m), wide=n)
    _summed(p, p.inner(dseen[1]), (value, dS.T, m), wide=n)
    if p.lookup:
        found, given = p.inner(u), p.inner(g)
        _summed(p, p.inner(dA[1]), (out, found.T, m), wide=0)
        _summed(p, p.inner(dA[2]), (given, value.T, m), wide=0)
        _summed(p, p.inner(dA[3]), (given, found.T, m), wide=0)
        _summed(p, p.inner(dseen[2]), (given, S.T, m), wide=n)
        _summed(p, p.inner(dseen[3]), (found, dS.T, m), wide=n)
    dfade = fade * (memory * dmemory).sum(-1).sum_to_size(fade.shape)
    grads = v.new_empty(4 if p.lookup else 2, batch, t, h, n)
    dq, dk, da, db = grads if p.lookup else (*grads, *grads)
    dw = v.new_empty(batch, t, h, w.shape[-1])
    given = (q, k, a, b, w, starts, dA, dseen, dfade, dq, dk, da, db, dw, *p.numbers)
    launch.run(scores_backward, (batch * h, z), *given, **p.scores)
    return dq, dk, dw, da, db


class _Memory(torch.autograd.Function):
    """The kernels, and beyond a plain backward the torch form."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, how: How, precision: str, *given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, last, memory, u = _forward(how, precision, given)
        ctx.how, ctx.precision = how, precision
        ctx.save_for_backward(*given, memory, u)
        return y, last

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor, dlast: Tensor
    ) -> tuple[Tensor | None, ...]:
        *given, memory, u = ctx.saved_tensors
        if autodiff.too_narrow(dy, dlast):
            return None, None, *autodiff.gradients(ctx.how.plain, given, (dy, dlast))
        with without_autocast(dy):
            return None, None, *_backward(ctx.how, ctx.precision, given, memory, u, dy, dlast)


def _backward(
    how: How,
    precision: str,
    given: Sequence[Any],
    memory: Tensor,
    u: Tensor,
    dy: Tensor,
    dlast: Tensor,
) -> tuple[Tensor | None, ...]:
    p, s0 = _problem(how, precision, given), given[6]
    q, w, v = given[0], given[3], given[2]
    (b, _, h, n, m, c, z), pieces = p.sizes, _pieces(p)
    A, seen, fade, T = pieces
    dy, end = dy.contiguous(), dlast if how.key_first else dlast.mT
    end, out, lookup = end.flatten(0, 1).contiguous(), p.tokens(dy), ()
    if p.lookup:
        own, reader = v.new_empty(b * h, z, c, m), torch.empty_like(seen[0])
        _summed(p, p.inner(own), (p.inner(T[2]).T, out, 0), wide=m)
        _summed(p, p.inner(reader), (p.inner(T[0]).T, p.inner(seen[3]), 0), wide=n)
        lookup = seen[2], reader, own
    dmemory, first, g = _walked(p, end, fade, seen[0], dy, *lookup, reverse=True)
    terms = [(p.inner(A[0]).T, out, 0), (p.inner(seen[1]), p.inner(dmemory), n)]
    if p.lookup:
        terms.append((p.inner(A[2]).T, p.inner(g), 0))
    dv = _summed(p, p.tokens(v.new_empty(v.shape)), *terms, wide=m)
    dq, dk, dw, da, db = _score_gradients(p, dy, g, u, memory, dmemory, pieces)
    if q.shape[2] != h:
        dq, dk = (x.unflatten(2, (q.shape[2], -1)).sum(3) for x in (dq, dk))
    da, db = (da, db) if p.lookup else (None, None)
    return dq, dk, dv, dw.sum_to_size(w.shape), da, db, _shaped(how, first, s0), None


_EXACT, _LOW = (MatrixMemory(partial(_run, low)) for low in (False, True))


def _by_dtype(name: str) -> Any:
    """The op of that name. What comes in as bfloat16 or float16 has fewer digits than TF32 keeps,
    whose products are the faster ones."""
    exact, low = getattr(_EXACT, name), getattr(_LOW, name)

    @wraps(exact)
    def op(first: Tensor, *rest: Any, **named: Any) -> Any:
        return (low if first.dtype in LOW_PRECISION else exact)(first, *rest, **named)

    return proven(op)


linear_attention = _by_dtype("linear_attention")
ssd, trapezoid = _by_dtype("ssd"), _by_dtype("trapezoid")
mimo_trapezoid = _by_dtype("mimo_trapezoid")
wkv7 = _by_dtype("wkv7")
delta_rule, delta_rule_2 = _by_dtype("delta_rule"), _by_dtype("delta_rule_2")
