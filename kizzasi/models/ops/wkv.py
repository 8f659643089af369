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

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kizzasi.errors import ShapeError

CHUNK_SIZE = 32


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
    tokens = _same_shape(r, w, k, v, a, b)
    s = _empty(r) if s0 is None else s0
    ys = []
    for i, token in enumerate(zip(*(x.unbind(1) for x in tokens), strict=True)):
        if starts is not None:
            s = s.masked_fill(starts[:, i, None, None, None], 0.0)
        y, s = wkv7_step(s, *token)
        ys.append(y)
    return torch.stack(ys, 1), s


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
    the same form. P[t] / P[s] is split at the middle of the chunk into a factor for each side, so
    that no exponent exceeds half a chunk of decay: float32 holds for any w > -2.5.

    Args, Returns, Raises: as `wkv7_ref`.

    Source: Yang et al. 2024, arXiv:2406.06484, section 3 (the WY form of the delta rule).
    Differs: a decay per channel, separate a and b, and documents that start anywhere in a chunk.
    """
    heads, s = r.shape[2], _empty(r) if s0 is None else s0
    length, c = r.shape[1], min(CHUNK_SIZE, r.shape[1])
    r, w, k, v, a, b = (_chunks(x, c) for x in _same_shape(r, w, k, v, a, b))
    queries, keys, enter, leave = _rebase(r, w, k, a, b)
    i = torch.arange(c, device=r.device)
    seen = torch.cat([i[:, None] > i, i[:, None] >= i]).tile(1, 2)  # a before its token, r after it
    from_entry, to_exit, carried = queries, keys, None
    if starts is not None:
        document = _chunks(starts[..., None, None].expand(-1, -1, heads, 1), c).cumsum(-2)
        seen = seen & (document == document.mT).tile(2, 2)
        from_entry = queries * (document == 0).unsqueeze(-3)
        to_exit = keys * (document == document[..., -1:, :]).tile(2, 1)
        carried = document[..., -1:, :] == 0
    scores = queries.flatten(-3, -2) @ keys.mT * seen.to(r.dtype)
    a_scores, r_scores = scores.chunk(2, -2)
    a_b, a_k = a_scores.chunk(2, -1)
    a, r = from_entry.unbind(-3)
    # Of u, the part that the chunk itself determines, and the matrix that reads the rest from S.
    own, read = torch.linalg.solve_triangular(
        -a_b, torch.cat([a_k @ v, a], -1), upper=False, unitriangular=True
    ).chunk(2, -1)

    s = s.flatten(0, 1) * enter[0]
    steps = torch.cat([leave[:-1] * enter[1:], leave[-1:]])
    ys = []
    for j, (own_j, read_j, v_j, r_j, scores_j, keys_j, step_j) in enumerate(
        zip(*(x.unbind(0) for x in (own, read, v, r, r_scores, to_exit, steps)), strict=True)
    ):
        values = torch.cat([torch.baddbmm(own_j, read_j, s.mT), v_j], -2)
        ys.append(torch.baddbmm(r_j @ s.mT, scores_j, values))
        kept = s if carried is None else s * carried[j]
        s = torch.baddbmm(kept, values.mT, keys_j) * step_j
    y = rearrange(torch.stack(ys), "z (b h) c n -> b (z c) h n", h=heads)
    return y[:, :length], s.unflatten(0, (-1, heads))


def wkv7_step(
    s: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `wkv7_ref`: memory s (b, h, n, n), the others (b, h, n); returns y and new s."""
    answer = s @ a.unsqueeze(-1)
    s = torch.addcmul(s * w.exp().unsqueeze(-2), answer, b.unsqueeze(-2))
    s = torch.addcmul(s, v.unsqueeze(-1), k.unsqueeze(-2))
    return (s @ r.unsqueeze(-1)).squeeze(-1), s


def wkv7_flops(batch: int, seq_len: int, heads: int, n: int) -> int:
    """Work of the matrix products of `wkv7`; a multiply-add counts 2."""
    c = min(CHUNK_SIZE, seq_len)
    chunks = batch * heads * -(-seq_len // c)
    within = 2 + 4 + 1 + 2  # in c c n: decays, scores, own values, outputs
    with_memory = 1 + 1 + 2  # in c n n: answers, outputs, the new memory
    return 2 * chunks * c * n * (within * c + with_memory * n)


def _rebase(
    r: Tensor, w: Tensor, k: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale both sides by the decay between them and the middle of their chunk.

    Returns:
        queries (z, bh, 2, c, n): a and r. keys (z, bh, 2c, n): b above k. The factors (z, bh, 1, n)
        that bring the memory to the middle when it enters, and from there to the end.
    """
    c = w.shape[-2]
    upto = torch.ones(c, c, dtype=w.dtype, device=w.device).tril()
    from_middle = torch.cat([upto - upto.diag().diag(), upto]) - upto[c // 2]
    log = (from_middle @ w).unflatten(-2, (2, c))  # of P[t-1] and of P[t]
    queries = torch.stack([a, r], -3) * log.exp()
    to_middle = -log[..., 1, :, :]
    keys = torch.stack([b, k], -3) * to_middle.exp().unsqueeze(-3)
    enter, leave = (-log[..., 0, :1, :]).exp(), log[..., 1, -1:, :].exp()
    return queries, keys.flatten(-3, -2), enter, leave


def _chunks(x: Tensor, c: int) -> Tensor:
    """(b, t, h, n) to (z, bh, c, n). Zeros fill the last chunk: they neither write nor decay."""
    missing = -x.shape[1] % c
    if missing:
        x = F.pad(x, (0, 0, 0, 0, 0, missing))
    return rearrange(x, "b (z c) h n -> z (b h) c n", c=c)


def _empty(r: Tensor) -> Tensor:
    b, _, h, n = r.shape
    return r.new_zeros(b, h, n, n)


def _same_shape(*inputs: Tensor) -> tuple[Tensor, ...]:
    shapes = [tuple(x.shape) for x in inputs]
    if len(set(shapes)) > 1:
        raise ShapeError(f"r, w, k, v, a, b must have one shape (b, t, h, n), got {shapes}")
    return inputs
