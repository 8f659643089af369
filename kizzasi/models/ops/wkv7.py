"""RWKV-7's recurrence: a matrix memory with a decay per channel and a generalised delta rule.

Symbols: b batch, t time, h heads, n channels of a head, c chunk size, z number of chunks.

| here | paper | meaning |
|---|---|---|
| S (b,h,n,n) | wkv_t^T | memory, indexed [value, key] |
| w | log w_t | log of the decay; RWKV-7 keeps it in (-exp(-0.5), 0) |
| a, b | -kappa_hat_t, kappa_hat_t * a_t | what is looked up; the key its answer is added under |
| u | S[t-1] a[t] | the answer |

Source: Peng et al. 2025, arXiv:2503.14456, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kizzasi.models.ops import autodiff, devices
from kizzasi.models.ops.chunks import by_head, joined
from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.precision import in_full_precision
from kizzasi.models.ops.shapes import Shapes
from kizzasi.models.ops.wkv7_wide import CHUNK_SIZE, wkv7_wide

WEAKEST = {torch.float32: -2.5, torch.float64: -20.0}  # log decays that `_WKV7` can divide by


@in_full_precision
def wkv7_ref(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    s0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read and rewrite a matrix memory one token at a time.

        S[t] = S[t-1] diag(exp(w[t])) + (S[t-1] a[t]) b[t]^T + v[t] k[t]^T
        y[t] = S[t] r[t]

    This loop is the definition; `wkv7` must agree with it. O(t) steps.

    Args:
        r: (b, t, h, n) what is read.
        w: (b, t, h, n) log of the decay, <= 0.
        k, v: (b, t, h, n) the key and value that are written.
        a, b: (b, t, h, n) the lookup whose answer is added again under the key b.
        s0: (b, h, n, n) memory carried in; zeros if None.
        starts: (b, t) bool, True where the memory is emptied before the token.

    Returns:
        (b, t, h, n) every y[t], and (b, h, n, n) the last S.

    Raises:
        ShapeError: the six inputs differ in shape.
    """
    s = _check(r, w, k, v, a, b, s0)
    ys = []
    for i, token in enumerate(zip(*(x.unbind(1) for x in (r, w, k, v, a, b)), strict=True)):
        if starts is not None:
            s = s.masked_fill(starts[:, i, None, None, None], 0.0)
        y, s = wkv7_step(s, *token)
        ys.append(y)
    return torch.stack(ys, 1), s


@in_full_precision
def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    s0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what `wkv7_ref` computes, chunk by chunk, with matrix products.

    In a chunk that is entered with memory S, and with P[t] the product of its decays up to t,

        u[t] = S P[t-1] a[t] + sum_{s<t} (u[s] b[s]^T + v[s] k[s]^T) (P[t-1] / P[s]) a[t]

    is a unit triangular system for all u at once; the outputs and the memory at the end are sums of
    the same form. On a CPU P[t] / P[s] is split at the middle of the chunk into a factor for each
    side, which float32 holds for any w > -2.5, and the adjoint is written out, for two thirds of
    autograd's time and half its memory. Stronger decays, other devices and further derivatives go
    through `wkv7_wide`, which divides by nothing.

    Args, Returns, Raises: as `wkv7_ref`.

    Source: Yang et al. 2024, arXiv:2406.06484, section 3 (the WY form of the delta rule).
    Differs: a decay per channel, separate a and b, and documents that start anywhere in a chunk. A
        memory that grew infinite out of finite numbers is not forgotten at a start.
    """
    s0 = _check(r, w, k, v, a, b, s0)

    def run(
        r: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, w: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        form = _WKV7.apply if _divides(w) else wkv7_wide
        return form(r, w, k, v, a, b, s, starts)

    return isolated(run, starts, (r, k, v, a, b), (w,), (s0,))


def _divides(w: Tensor) -> bool:
    """The rule. Only a CPU says at once whether the decays are weak enough to divide by; the meta
    device has none."""
    return w.is_meta or (devices.answers(w) and bool(w.detach().amin() > WEAKEST[w.dtype]))


@in_full_precision
def wkv7_step(
    s: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `wkv7_ref`: memory s (b, h, n, n), the others (b, h, n); returns y and new s."""
    answer = s @ a.unsqueeze(-1)
    s = torch.addcmul(s * w.exp().unsqueeze(-2), answer, b.unsqueeze(-2))
    s = torch.addcmul(s, v.unsqueeze(-1), k.unsqueeze(-2))
    return (s @ r.unsqueeze(-1)).squeeze(-1), s


def wkv7_step_(
    s: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    """y of `wkv7_step`, which writes the new memory into s."""
    answer = s @ a.unsqueeze(-1)
    s.mul_(w.exp().unsqueeze(-2)).addcmul_(answer, b.unsqueeze(-2))
    s.addcmul_(v.unsqueeze(-1), k.unsqueeze(-2))
    return (s @ r.unsqueeze(-1)).squeeze(-1)


def wkv7_flops(batch: int, seq_len: int, heads: int, n: int) -> int:
    """Work of the matrix products of `wkv7`; a multiply-add counts 2."""
    c = min(CHUNK_SIZE, seq_len)
    chunks = batch * heads * -(-seq_len // c)
    within = 2 + 4 + 2 + 1 + 2  # in c c n: decays, scores, own u, reader of S, outputs
    with_memory = 1 + 1 + 2  # in c n n: u, outputs, the new memory
    return 2 * chunks * c * n * (within * c + with_memory * n)


class _Sight(NamedTuple):
    """What sees what, as factors 0 and 1; None is 1 everywhere.

    seen: (.., 2c, 2c) the query sees the key.
    entry: (zbh, 2c, 1) the query is of the document that the chunk was entered with.
    exit: (zbh, 2c, 1) the key is of the document that the chunk is left with.
    carried: z times (bh, 1, 1), those two are the same.
    """

    seen: Tensor
    entry: Tensor | None
    exit: Tensor | None
    carried: Sequence[Tensor | None]


class _WKV7(torch.autograd.Function):
    """The chunked form and its adjoint. All chunks of all heads lie in one batch, (z b h).

    queries Q (2c, n) stack a over r, and keys K stack b over k, both re-based; values (2c, n) stack
    u over v. scores A (2c, 2c) are Q K^T where the key is seen, in blocks ab, ak, rb, rk. With the
    solver T = (1 - A_ab)^-1, each chunk takes memory S to S' and gives

        u = T (A_ak v + Q_a S^T),       y = A_r values + Q_r S^T,       S' = (S + values^T K) step
    """

    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        s0: Tensor,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.shape, c = r.shape[:3], min(CHUNK_SIZE, r.shape[1])
        inputs = (r, w, k, v, a, b, s0, starts)
        z = -(-r.shape[1] // c)
        r, w, k, v, a, b = (by_head(x, c) for x in (r, w, k, v, a, b))
        n = r.shape[-1]
        decay = (_from_middle(c, w) @ w).exp_()
        queries = torch.cat([a, r], 1).mul_(decay)
        keys = torch.cat([b, k], 1)
        keys.unflatten(1, (2, c)).div_(decay[:, None, c:])
        sight = _look(starts, z, decay)
        scores = torch.bmm(queries, keys.mT).mul_(sight.seen)
        eye = torch.eye(c, dtype=w.dtype, device=w.device).expand(len(scores), c, c)
        solver = torch.linalg.solve_triangular(
            -scores[:, :c, :c], eye, upper=False, unitriangular=True
        )
        reads, writes = _times(queries, sight.entry), _times(keys, sight.exit)
        own = torch.bmm(solver, torch.bmm(scores[:, :c, c:], v))
        reader = torch.bmm(solver, reads[:, :c])

        own, reader, v, writes = (x.unflatten(0, (z, -1)) for x in (own, reader, v, writes))
        enter, step = _rescale(decay, z)
        memory = decay.new_empty(z + 1, own.shape[1], n, n)
        values = torch.empty_like(writes)
        torch.mul(s0.flatten(0, 1), enter, out=memory[0])
        for j in range(z):
            u = torch.baddbmm(own[j], reader[j], memory[j].mT)
            torch.cat([u, v[j]], 1, out=values[j])
            kept = _times(memory[j], sight.carried[j])
            torch.baddbmm(kept, values[j].mT, writes[j], out=memory[j + 1]).mul_(step[j])
        y = torch.bmm(reads[:, c:], memory[:-1].flatten(0, 1).mT)
        torch.baddbmm(y, scores[:, c:], values.flatten(0, 1), out=y)
        ctx.save_for_backward(*inputs, decay, queries, keys, scores, solver, values, memory)
        return joined(y, *ctx.shape), memory[-1].view(s0.shape).clone()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor, ds: Tensor
    ) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # asked for once: checkpointing hands them out once
        inputs, saved = kept[:8], kept[8:]
        if autodiff.too_narrow(dy, ds):
            return autodiff.gradients(wkv7_wide, inputs, (dy, ds))
        (decay, queries, keys, scores, solver, values, memory), starts = saved, inputs[-1]
        z, c = len(values), values.shape[2] // 2
        with torch.autocast(dy.device.type, enabled=False):
            sight = _look(starts, z, decay)
            enter, step = _rescale(decay, z)
            dy = by_head(dy, c)
            reads, writes = _times(queries, sight.entry), _times(keys, sight.exit)
            own = torch.bmm(solver.mT, torch.bmm(scores[:, c:, :c].mT, dy))
            reader = torch.bmm(solver.mT, writes[:, :c])

            # The adjoint's own recurrence, from the last chunk to the first: ds is that of S'.
            own, reader, dy, reads = (x.unflatten(0, (z, -1)) for x in (own, reader, dy, reads))
            dmemory, dout = torch.empty_like(memory[1:]), torch.empty_like(values)
            ds = ds.flatten(0, 1)
            for j in reversed(range(z)):
                torch.mul(ds, step[j], out=dmemory[j])
                du = torch.baddbmm(own[j], reader[j], dmemory[j].mT)
                torch.cat([du, dy[j]], 1, out=dout[j])
                kept = _times(dmemory[j], sight.carried[j])
                ds = torch.baddbmm(kept, dout[j].mT, reads[j])

            at_steps = (dmemory * memory[1:]).sum(-2) / step.squeeze(-2)
            at_entry = (ds * memory[0]).sum(-2)
            dmemory, dout, values = (x.flatten(0, 1) for x in (dmemory, dout, values))
            dscores = torch.bmm(dout, values.mT).mul_(sight.seen)
            dqueries = _times(torch.bmm(dout, memory[:-1].flatten(0, 1)), sight.entry)
            torch.baddbmm(dqueries, dscores, keys, out=dqueries)
            dkeys = _times(torch.bmm(values, dmemory), sight.exit)
            torch.baddbmm(dkeys, dscores.mT, queries, out=dkeys)
            dv = torch.bmm(scores[:, :, c:].mT, dout)
            torch.baddbmm(dv, writes[:, c:], dmemory.mT, out=dv)

            dlog = dqueries * queries  # of the exponents, re-based as in `_from_middle`
            dlog[:, c:] -= (dkeys * keys).unflatten(1, (2, c)).sum(1)
            ends = dlog.unflatten(0, (z, -1))
            ends[:, :, -1] += at_steps
            ends[1:, :, 0] -= at_steps[:-1]
            ends[0, :, 0] -= at_entry
            dw = _from_middle(c, dlog).mT @ dlog
            da, dr = dqueries.mul_(decay).chunk(2, 1)
            db, dk = dkeys.unflatten(1, (2, c)).div_(decay[:, None, c:]).unbind(1)
            grads = [joined(x, *ctx.shape) for x in (dr, dw, dk, dv, da, db)]
            return *grads, (ds * enter).unflatten(0, (ctx.shape[0], -1)), None


def _from_middle(c: int, like: Tensor) -> Tensor:
    """(2c, c): sums log decays from the middle of a chunk to before, and to after, each token."""
    upto = torch.ones(c, c, dtype=like.dtype, device=like.device).tril()
    return torch.cat([upto.tril(-1), upto]) - upto[c // 2]


def _rescale(decay: Tensor, z: int) -> tuple[Tensor, Tensor]:
    """Factors that take the memory from the middle of one chunk to that of the next.

    Returns:
        (bh, 1, n) from s0 to the first middle; (z, bh, 1, n) from each middle to the next one, and
        from the last one to the end.
    """
    decay = decay.unflatten(0, (z, -1))
    enter, leave = decay[:, :, :1].reciprocal(), decay[:, :, -1:]
    return enter[0], torch.cat([leave[:-1] * enter[1:], leave[-1:]])


def _look(starts: Tensor | None, z: int, decay: Tensor) -> _Sight:
    c, dtype = decay.shape[1] // 2, decay.dtype
    i = torch.arange(c, device=decay.device)
    seen = torch.cat([i[:, None] > i, i[:, None] >= i]).tile(1, 2)  # a before its token, r after it
    if starts is None:
        return _Sight(seen.to(dtype), None, None, [None] * z)
    heads = len(decay) // (z * len(starts))
    starts = starts[..., None, None].expand(-1, -1, heads, 1)
    document = by_head(starts, c).cumsum(-2)
    last = document[:, -1:]
    seen = seen & (document == document.mT).tile(1, 2, 2)
    first_document, last_document = ((document == i).tile(1, 2, 1).to(dtype) for i in (0, last))
    carried = (last == 0).to(dtype).unflatten(0, (z, -1)).unbind(0)
    return _Sight(seen.to(dtype), first_document, last_document, carried)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


SHAPES = Shapes(**dict.fromkeys("rwkvab", "b t h n"), s0="b h n n")


def _check(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s0: Tensor | None
) -> Tensor:
    """Compare shapes; the memory before the first token."""
    batch, _, h, n = SHAPES(r, w, k, v, a, b, s0)
    return r.new_zeros(batch, h, n, n) if s0 is None else s0


WKV7 = Engines(
    "wkv7",
    reference=wkv7_ref,
    torch=wkv7,
    native="kizzasi.models.ops.native.memory:wkv7",
    triton="kizzasi.models.ops.triton.memory:wkv7",
)
