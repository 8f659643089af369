"""Linear attention with decay: a matrix memory that fades, channel by channel, as it is written.

One recurrence for RetNet, gated linear attention, RWKV-5 and RWKV-6; they differ in the decay.

Symbols: b batch, t time, h heads, n channels of a key, m channels of a value, c chunk size,
z number of chunks.

| here | RetNet | GLA | RWKV-5, 6 | meaning |
|---|---|---|---|---|
| q, k, v | Q, K, V | q, k, v | r, k, v | what is read, the key and value that are written |
| w | log gamma | log alpha | log w | log of the decay, <= 0 |
| u (h,n) | | | u | weight of the present token, which is read before it is written |
| S (b,h,n,m) | S | S | wkv | memory, indexed [key, value] |

Source: Sun et al. 2023, arXiv:2307.08621; Yang et al. 2023, arXiv:2312.06635; Peng et al. 2024,
arXiv:2404.05892.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from kizzasi.models.ops.chunks import chunk_size, chunks, joined
from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.precision import in_full_precision
from kizzasi.models.ops.shapes import Shapes

CHUNK_SIZE = 32  # a power of two


@in_full_precision
def linear_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor | None = None,
    s0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write to and read from a fading matrix memory, one token at a time.

        S[t] = diag(exp(w[t])) S[t-1] + k[t] v[t]^T
        y[t] = q[t] S[t],      or with u:  y[t] = q[t] (S[t-1] + diag(u) k[t] v[t]^T)

    This loop is the definition; `linear_attention` must agree with it. O(t) steps.

    Args:
        q, k: (b, t, h, n), t >= 1.
        v: (b, t, h, m).
        w: (b, t, h, n) log of the decay, <= 0, any dimension of which may be 1: a last 1 is one
            decay per head, a first and second 1 a decay that never changes.
        u: (h, n) weight of the present token; None means that it is read like all others.
        s0: (b, h, n, m) memory carried in; zeros if None.
        starts: (b, t) bool, True where the memory is emptied before the token.

    Returns:
        (b, t, h, m) every y[t], and (b, h, n, m) the last S. All tensors have one dtype.

    Raises:
        ShapeError: a shape disagrees with that of q; the message shows both.
    """
    s = _check(q, k, v, w, u, s0)
    decay = w.exp().expand(*q.shape[:3], -1).unsqueeze(-1)
    written = k.unsqueeze(-1) * v.unsqueeze(-2)
    before, after = [], []
    for i in range(q.shape[1]):
        if starts is not None:
            s = s.masked_fill(starts[:, i, None, None, None], 0.0)
        before.append(s)
        s = torch.addcmul(written[:, i], decay[:, i], s)
        after.append(s)
    if u is None:
        seen = torch.stack(after, 1)
    else:  # the last s is stacked too, so that even one token gives w a gradient: zero
        seen = torch.addcmul(torch.stack([*before, s], 1)[:, :-1], u.unsqueeze(-1), written)
    return (q.unsqueeze(-2) @ seen).squeeze(-2), s


@in_full_precision
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor | None = None,
    s0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what `linear_attention_ref` computes, with matrix products.

    Blocks of one token are joined in pairs until they are chunks. A block knows, for each of its
    tokens, the decay from its start to the token (held in `reads` = q times it) and from the token
    to its end (in `writes` = k times it). When two blocks meet, the queries of the second see the
    keys of the first:

        y2 += (reads2 writes1^T) v1;    reads2 *= decay of block 1;    writes1 *= decay of block 2

    Chunks then pass the memory on. What fades over a whole chunk is the exponential of a sum of
    logs, not a product of exponentials: of a decay of exp(-1e-8) float32 knows only the log. Every
    factor is at most 1, for decays of any strength: nothing is divided. A document that starts is a
    decay of 0. Products below 1e-38 are denormal numbers, with which a CPU is slow: a program whose
    decays are that strong may set `torch.set_flush_denormal(True)`.

    Args, Returns, Raises: as `linear_attention_ref`.

    Source: the two levels of Yang et al. 2023, section 4, made as many as fit.
    """
    s = _check(q, k, v, w, u, s0)
    fixed = w.shape[:2] != q.shape[:2]

    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return _joined(q, k, v, w if fixed else rest[0], u, rest[-1], starts)

    return isolated(run, starts, (q, k, v), () if fixed else (w,), (s,))


def _joined(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor | None, s: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    (b, t, h, _), c, s = q.shape, chunk_size(q.shape[1], CHUNK_SIZE), s.flatten(0, 1)
    kept = _fading(w, starts, b, t, c)
    decay, reads = w.exp().expand(b, t, h, -1), q
    if starts is not None:
        decay, reads = (x.masked_fill(starts[..., None, None], 0.0) for x in (decay, reads))
    own, reads = (q * k, reads * decay) if u is None else (q * u * k, reads)
    own, reads, writes, values = (_tokens(x, c) for x in (own.sum(-1, True), reads, k, v))
    decay = _tokens(decay, c, 1.0)

    y = own * values
    while y.shape[1] < c:
        (r1, r2), (k1, k2), (d1, d2) = _halves(reads), _halves(writes), _halves(decay)
        (v1, _), (y1, y2) = _halves(values), _halves(y)
        y = torch.cat([y1, torch.baddbmm(y2, torch.bmm(r2, k1.mT), v1)], 1)
        reads, writes = torch.cat([r1, r2 * d1], 1), torch.cat([k1 * d2, k2], 1)
        values, decay = values.view_as(y), d1 * d2

    memory = [s]  # the last one is stacked too, for the sake of w's gradient in a single chunk
    added = torch.bmm(writes.mT, values).unflatten(0, (-1, b * h))
    for kept_j, added_j in zip(kept.unbind(1), added.unbind(), strict=True):
        memory.append(torch.addcmul(added_j, kept_j.flatten(0, 1), memory[-1]))
    y = torch.baddbmm(y, reads, torch.stack(memory)[:-1].flatten(0, 1))
    return joined(y, b, t, h), memory[-1].unflatten(0, (b, h))


def _fading(w: Tensor, starts: Tensor | None, b: int, t: int, c: int) -> Tensor:
    """(b, z, h, n or 1, 1) what memory keeps from one chunk to the next, by a sum of logs."""
    if starts is not None:
        w = w.masked_fill(starts[..., None, None], -torch.inf)
    if w.shape[1] == 1:
        sizes = [min(c, t - start) for start in range(0, t, c)]
        kept = (w * torch.tensor(sizes, dtype=w.dtype, device=w.device)[:, None, None]).exp()
    else:
        kept = chunks(w, c).sum(2).exp()
    return kept.expand(b, -1, -1, -1).unsqueeze(-1)


@in_full_precision
def linear_attention_step(
    s: Tensor, q: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `linear_attention_ref`: memory s (b, h, n, m); q, k, w (b, h, n); v (b, h, m).

    Returns y (b, h, m) and the new s.
    """
    written = k.unsqueeze(-1) * v.unsqueeze(-2)
    after = torch.addcmul(written, w.exp().unsqueeze(-1), s)
    seen = after if u is None else torch.addcmul(s, u.unsqueeze(-1), written)
    return (q.unsqueeze(-2) @ seen).squeeze(-2), after


def linear_attention_step_(s: Tensor, q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """y of `linear_attention_step` without u, which writes the new memory into s."""
    s.mul_(w.exp().unsqueeze(-1)).addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
    return (q.unsqueeze(-2) @ s).squeeze(-2)


def linear_attention_flops(batch: int, seq_len: int, heads: int, n: int, m: int) -> int:
    """Work of the matrix products of `linear_attention`; a multiply-add counts 2."""
    c = chunk_size(seq_len, CHUNK_SIZE)
    return batch * heads * -(-seq_len // c) * c * ((c - 1) * (n + m) + 4 * n * m)


def _tokens(x: Tensor, c: int, fill: float = 0.0) -> Tensor:
    """(b, t, h, n) to (z b h c, 1, n): blocks of one token, chunk by chunk; `fill` ends the last.

    Keys of 0 and decays of 1 neither write nor fade.
    """
    return rearrange(chunks(x, c, fill), "b z c h n -> (z b h c) 1 n").contiguous()


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    """(2 k, c, n) to the first and second blocks of k pairs."""
    return x.unflatten(0, (-1, 2)).unbind(1)


SHAPES = Shapes(q="b t h n", k="b t h n", v="b t h m", w="b|1 t|1 h|1 n|1", u="h n", s0="b h n m")


def _check(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor | None, s0: Tensor | None
) -> Tensor:
    """The memory before the first token, once the shapes agree."""
    b, _, h, n, m = SHAPES(q, k, v, w, u, s0)
    return q.new_zeros(b, h, n, m) if s0 is None else s0


LINEAR_ATTENTION = Engines(
    "linear_attention",
    reference=linear_attention_ref,
    torch=linear_attention,
    native="kizzasi.models.ops.native.memory:linear_attention",
    triton="kizzasi.models.ops.triton.memory:linear_attention",
)
