"""The gated delta rule: a matrix memory that fades, and that a write corrects instead of adds to.

Symbols: b batch, t time, h heads, d_k and d_v widths of a key and a value, c chunk size, z chunks.

| here | Yang et al. | Kimi Linear | meaning |
|---|---|---|---|
| S (b,h,d_k,d_v) | S_t^T | S_t | memory, indexed [key, value] |
| g | log alpha_t | log alpha_t | log of the decay, one a head or one a channel of its key |
| beta | beta_t | beta_t | share of the old value under a key that a write removes |
| u | | | what a write adds under its key |

| here | Hatamizadeh et al. | meaning |
|---|---|---|
| erase, write | b_t, w_t | beta for every channel of a key, and for every channel of a value |

Four published layers are this one recurrence: DeltaNet (g = 0), gated DeltaNet (one g a head), Kimi
delta attention (one a channel) and gated DeltaNet-2 (erase and write in place of beta). It fades
first and removes second. The two commute for one g a head, since that scales the whole memory; for
one a channel they do not.

`ops/wkv7.py` can express all three (a = -k exp(g), b = beta k), but only with d_k = d_v. Here g may
be as low as -inf, and no exponent is positive.

Sources: DeltaNet, Yang et al. 2024, arXiv:2406.06484. Gated DeltaNet, Yang et al. 2024,
arXiv:2412.06464, section 3. Kimi delta attention, Kimi Team 2025, arXiv:2510.26692, section 3.
Gated DeltaNet-2, Hatamizadeh et al. 2026, arXiv:2605.22791.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kizzasi.models.ops.chunks import by_head, chunk_size, joined
from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.precision import in_full_precision
from kizzasi.models.ops.shapes import Shapes

CHUNK_SIZE = 32  # a power of 2


@in_full_precision
def delta_rule_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    s0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fade, correct and read a matrix memory one token at a time.

        S[t] = (I - beta[t] k[t] k[t]^T) diag(exp(g[t])) S[t-1] + beta[t] k[t] v[t]^T
        y[t] = S[t]^T q[t]

    This loop is the definition; `delta_rule` must agree with it. O(t) steps.

    Args:
        q, k: (b, t, h, d_k) what is read; the key that is written. For |k| = 1, S cannot grow by
            itself if beta is in [0, 2].
        v: (b, t, h, d_v) the value that is written.
        g: (b, t, h, d_k) or (b, t, h, 1) log of the decay, <= 0.
        beta: (b, t, h) how far a write moves what k finds towards v: 0 not at all, 1 all the way.
        s0: (b, h, d_k, d_v) memory carried in; zeros if None.
        starts: (b, t) bool, True where the memory is emptied before the token.

    Returns:
        (b, t, h, d_v) every y[t], and (b, h, d_k, d_v) the last S.

    Raises:
        ShapeError: a shape disagrees with those of k and v; the message shows both.
    """
    s = _check(q, k, v, g, s0, beta=beta)
    return _loop(delta_rule_step, (q, k, v, g, beta), s, starts)


def _loop(
    step: Callable[..., tuple[Tensor, Tensor]],
    streams: Sequence[Tensor],
    s: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    ys = []
    for i, token in enumerate(zip(*(x.unbind(1) for x in streams), strict=True)):
        if starts is not None:
            s = s.masked_fill(starts[:, i, None, None, None], 0.0)
        y, s = step(s, *token)
        ys.append(y)
    return torch.stack(ys, 1), s


@in_full_precision
def delta_rule_step(
    s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `delta_rule_ref`: s (b, h, d_k, d_v), the others without t; y and the new s."""
    s = s * g.exp().unsqueeze(-1)
    found = (k.unsqueeze(-2) @ s).squeeze(-2)
    u = beta.unsqueeze(-1) * (v - found)
    s = torch.addcmul(s, k.unsqueeze(-1), u.unsqueeze(-2))
    return (q.unsqueeze(-2) @ s).squeeze(-2), s


def delta_rule_step_(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """y of `delta_rule_step`, which writes the new s into s."""
    s.mul_(g.exp().unsqueeze(-1))
    found = (k.unsqueeze(-2) @ s).squeeze(-2)
    s.addcmul_(k.unsqueeze(-1), (beta.unsqueeze(-1) * (v - found)).unsqueeze(-2))
    return (q.unsqueeze(-2) @ s).squeeze(-2)


@in_full_precision
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    s0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what `delta_rule_ref` computes, chunk by chunk, with matrix products.

    With P[t, s] the product of the decays after token s up to and with token t, and S the memory
    that enters the chunk, what the tokens of a chunk add is a unit triangular system:

        u[t] = beta[t] (v[t] - (k[t] P[t])^T S - sum_{s<t} (k[t] P[t, s] . k[s]) u[s])
        y[t] = (q[t] P[t])^T S + sum_{s<=t} (q[t] P[t, s] . k[s]) u[s]

    Args, Returns, Raises: as `delta_rule_ref`.

    Source: Yang et al. 2024, arXiv:2406.06484, section 3 (the WY form of the delta rule).
    Differs: decays enter by `_decayed_scores`, safe for any g. A document starts with g = -inf,
        which does not forget an S that grew infinite out of finite numbers (0 times infinity is
        NaN); NaN and infinities that come in stay in their document.
    """
    s = _check(q, k, v, g, s0, beta=beta)

    def run(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        beta = beta.unsqueeze(-1)
        return _by_chunks(q, k, beta * k, beta * v, g, s, starts)

    return isolated(run, starts, (q, k, v, beta), (g,), (s,))


@in_full_precision
def delta_rule_2_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    erase: Tensor,
    write: Tensor,
    s0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`delta_rule_ref` with gates of their own for what is removed and for what is written.

        S[t] = (I - k[t] (erase[t] k[t])^T) diag(exp(g[t])) S[t-1] + k[t] (write[t] v[t])^T
        y[t] = S[t]^T q[t]

    This loop is the definition; `delta_rule_2` must agree with it. O(t) steps.

    Args:
        erase: (b, t, h, d_k) how much of every channel of a key takes part in finding what is
            removed, in [0, 1]. Where they differ, I - k (erase k)^T is not symmetric, and may
            lengthen S.
        write: (b, t, h, d_v) how much of every channel of a value is written, in [0, 1].
        The others as there.

    Returns, Raises: as there.
    """
    s = _check(q, k, v, g, s0, erase=erase, write=write)
    return _loop(delta_rule_2_step, (q, k, v, g, erase, write), s, starts)


@in_full_precision
def delta_rule_2_step(
    s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, erase: Tensor, write: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `delta_rule_2_ref`: s (b, h, d_k, d_v), the others without t; y, the new s."""
    s = s * g.exp().unsqueeze(-1)
    found = ((erase * k).unsqueeze(-2) @ s).squeeze(-2)
    s = torch.addcmul(s, k.unsqueeze(-1), (write * v - found).unsqueeze(-2))
    return (q.unsqueeze(-2) @ s).squeeze(-2), s


@in_full_precision
def delta_rule_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    erase: Tensor,
    write: Tensor,
    s0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`delta_rule_2_ref` chunk by chunk, as `delta_rule`; what holds there holds here."""
    s = _check(q, k, v, g, s0, erase=erase, write=write)

    def run(
        q: Tensor, k: Tensor, v: Tensor, erase: Tensor, write: Tensor, g: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _by_chunks(q, k, erase * k, write * v, g, s, starts)

    return isolated(run, starts, (q, k, v, erase, write), (g,), (s,))


def _by_chunks(
    q: Tensor, k: Tensor, e: Tensor, v: Tensor, g: Tensor, s: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S[t] = (I - k[t] e[t]^T) diag(exp(g[t])) S[t-1] + k[t] v[t]^T, as in `delta_rule`."""
    (b, t, h, _), c, s = k.shape, chunk_size(k.shape[1], CHUNK_SIZE), s.flatten(0, 1)
    if starts is not None:
        g = g.masked_fill(starts[..., None, None], -torch.inf)
    q, k, e, v, g = (by_head(x, c) for x in (q, k, e, v, g))
    queries = torch.stack([e, q], -2)
    scores, since, until = _decayed_scores(queries, k, g)
    remove, attend = scores.unbind(-2)
    eye = torch.eye(c, dtype=k.dtype, device=k.device).expand_as(remove)
    solver = torch.linalg.solve_triangular(remove, eye, upper=False, unitriangular=True)
    finds, reads = (queries * since.exp().unsqueeze(-2)).unbind(-2)
    writes, fade = (k * until.exp()).mT, since[:, -1:].exp().mT

    per_chunk = (solver @ v, solver @ finds, writes, fade)
    us, memories = [], []
    for own, found, write, kept in zip(*(x.split(b * h) for x in per_chunk), strict=True):
        memories.append(s)
        us.append(torch.baddbmm(own, found, s, alpha=-1))
        s = torch.baddbmm(kept * s, write, us[-1])
    y = torch.baddbmm(reads @ torch.cat(memories), attend, torch.cat(us))
    return joined(y, b, t, h), s.unflatten(0, (b, h))


def delta_rule_flops(
    batch: int, seq_len: int, heads: int, d_k: int, d_v: int, *, per_channel: bool
) -> int:
    """Work of the matrix products of `delta_rule`; a multiply-add counts 2.

    per_channel: g has d_k > 1 numbers a head, not one.
    """
    c = chunk_size(seq_len, CHUNK_SIZE)
    chunks = batch * heads * -(-seq_len // c)
    scores = (c - 1 if per_channel else 2 * c) * d_k
    within = scores + c * (d_v + d_k + d_v)  # scores; own u, found, outputs
    with_memory = 3 * d_k * d_v  # u, outputs, the new memory
    return 2 * chunks * c * (within + with_memory)


@in_full_precision
def l2_normalise(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last dimension, as the published layers have it."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def _decayed_scores(queries: Tensor, keys: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Products of queries with the keys of earlier tokens, faded by the decays in between.

        scores[t, s] = sum_n queries[t, n] exp(g[s+1, n] + .. + g[t, n]) keys[s, n],      s <= t

    Exponents are sums of g and never differences: nothing cancels, and g may be -inf.

    Args:
        queries: (b, c, r, n) r queries a token. c is a power of 2.
        keys: (b, c, n).
        g: (b, c, n) or (b, c, 1) log decays.

    Returns:
        scores (b, c, r, c), zero for later keys; the log decays since the first token and with it,
        and those after each token until the last: both shaped as g.
    """
    if g.shape[-1] > 1:
        return _scores_per_channel(queries, keys, g)
    b, c, r, _ = queries.shape
    sees = torch.ones(c, c, dtype=torch.bool, device=g.device).tril()
    between = g.expand(b, c, c).masked_fill(~sees.tril(-1), 0.0).cumsum(1)
    fade = between.masked_fill(~sees, -torch.inf).exp()
    scores = (queries.flatten(1, 2) @ keys.mT).view(b, c, r, c) * fade.unsqueeze(2)
    return scores, g.cumsum(1), between[:, -1, :, None]


def _scores_per_channel(queries: Tensor, keys: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_decayed_scores` for one decay a channel.

    Neighbouring blocks of 1, 2, 4, .. tokens are joined until one is left. Scores across a joint
    are a product of queries faded since the joint and keys faded until it, so that no factor is
    above 1. All joints together take half the work of the full product.
    """
    scores = (queries * keys.unsqueeze(-2)).sum(-1)[:, :, None, :, None]
    since, until = g.unsqueeze(2), torch.zeros_like(g).unsqueeze(2)  # (b, blocks, size, n)
    for size in (1 << i for i in range((keys.shape[1] - 1).bit_length())):
        pairs, tokens = (-1, 2), (-1, 2, size)
        since_l, since_r = since.unflatten(1, pairs).unbind(2)
        until_l, until_r = until.unflatten(1, pairs).unbind(2)
        scores_l, scores_r = scores.unflatten(1, pairs).unbind(2)
        late = queries.unflatten(1, tokens)[:, :, 1] * since_r.exp().unsqueeze(-2)
        early = keys.unflatten(1, tokens)[:, :, 0] * until_l.exp()
        across = (late.flatten(2, 3) @ early.mT).view_as(scores_r)
        upper = torch.cat([scores_l, torch.zeros_like(across)], -1)
        scores = torch.cat([upper, torch.cat([across, scores_r], -1)], 2)
        since, until = (
            torch.cat([since_l, since_r + since_l[:, :, -1:]], 2),
            torch.cat([until_l + since_r[:, :, -1:], until_r], 2),
        )
    return scores.squeeze(1), since.squeeze(1), until.squeeze(1)


SHAPES = Shapes(
    k="b t h d_k",
    v="b t h d_v",
    q="b t h d_k",
    g="b t h d_k|1",
    s0="b h d_k d_v",
    beta="b t h",
    erase="b t h d_k",
    write="b t h d_v",
)


def _check(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, s0: Tensor | None, **gates: Tensor
) -> Tensor:
    """Check shapes; the memory to begin with."""
    b, _, h, d_k, d_v = SHAPES(k, v, q, g, s0, *map(gates.get, ("beta", "erase", "write")))
    return k.new_zeros(b, h, d_k, d_v) if s0 is None else s0


NATIVE, TRITON = (f"kizzasi.models.ops.{engine}.memory" for engine in ("native", "triton"))
DELTA_RULE = Engines(
    "delta_rule",
    reference=delta_rule_ref,
    torch=delta_rule,
    native=f"{NATIVE}:delta_rule",
    triton=f"{TRITON}:delta_rule",
)
DELTA_RULE_2 = Engines(
    "delta_rule_2",
    reference=delta_rule_2_ref,
    torch=delta_rule_2,
    native=f"{NATIVE}:delta_rule_2",
    triton=f"{TRITON}:delta_rule_2",
)
