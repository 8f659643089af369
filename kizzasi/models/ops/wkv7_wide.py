"""RWKV-7's recurrence in chunks without a quotient: for decays of any strength, on any device.

Symbols as in ops/wkv7.py. Plain torch operations, differentiable as often as need be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kizzasi.models.ops.chunks import by_head, chunk_size, joined

CHUNK_SIZE = 32  # a power of 2


def wkv7_wide(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    s0: Tensor,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`wkv7` for decays of any strength, in plain torch operations: w may be -inf.

    Arguments and results as in `wkv7_ref`. Exponents are sums of w and never differences.
    """
    c = chunk_size(r.shape[1], CHUNK_SIZE)
    reset = torch.zeros_like(w[..., :1])
    if starts is not None:
        reset = reset.masked_fill(starts[..., None, None], -torch.inf)
    shape, z = r.shape, -(-r.shape[1] // c)
    read = r * w.exp()  # r sees the memory one decay later than a
    a, read, r, b, k, v, w, reset = (by_head(x, c) for x in (a, read, r, b, k, v, w, reset))
    queries, keys = torch.stack([a, read], 2), torch.stack([b, k], 2)
    scores, since, until, whole = _scores(queries, keys, w, reset)
    looked, seen = scores.unbind(2)
    now = torch.eye(c, dtype=r.dtype, device=r.device).unsqueeze(1)
    seen = seen + now * (keys * r.unsqueeze(2)).sum(-1).mT.unsqueeze(1)
    eye = now.squeeze(1).expand(len(w), c, c)
    solver = torch.linalg.solve_triangular(-looked[:, :, 0], eye, upper=False, unitriangular=True)
    finds, reads = (queries * since.exp().unsqueeze(2)).unbind(2)
    forgets, writes = (keys * until.exp().unsqueeze(2)).unbind(2)

    per_chunk = (
        solver @ (looked[:, :, 1] @ v),
        solver @ finds,
        forgets,
        v.mT @ writes,
        whole.exp(),
    )
    us, memories, s = [], [], s0.flatten(0, 1)
    for own, found, forget, added, kept in zip(
        *(x.unflatten(0, (z, -1)).unbind(0) for x in per_chunk), strict=True
    ):
        memories.append(s)
        us.append(torch.baddbmm(own, found, s.mT))
        s = torch.baddbmm(torch.addcmul(added, s, kept), us[-1].mT, forget)
    y = reads @ torch.cat(memories).mT + seen[:, :, 0] @ torch.cat(us) + seen[:, :, 1] @ v
    return joined(y, *shape[:3]), s.view(s0.shape)


def _scores(
    queries: Tensor, keys: Tensor, w: Tensor, reset: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of two queries a token with two keys of each earlier one, faded in between.

    Neighbouring blocks of 1, 2, 4, .. tokens are joined until one is left. Scores across a joint
    are a product of queries faded since the joint and keys faded until it.

    Args:
        queries, keys: (.., c, 2, n). w: (.., c, n) log decays after each token; reset: (.., c, 1)
        those before it.

    Returns:
        (.., c, 2, 2, c) query token, query, key, key token; the log decays since the first token,
        those after each token, (.., c, n) both, and their sum (.., 1, n).
    """
    c = w.shape[1]
    scores = torch.zeros_like(queries[..., :1]).expand(-1, -1, -1, 2).unsqueeze(2).unsqueeze(-1)
    since = (reset + torch.zeros_like(w)).unsqueeze(2)  # (.., blocks, size, n), all of them
    until, whole = torch.zeros_like(since), since + w.unsqueeze(2)
    for size in (1 << i for i in range((c - 1).bit_length())):
        pairs, tokens = (-1, 2), (-1, 2, size)
        since_l, since_r = since.unflatten(1, pairs).unbind(2)
        until_l, until_r = until.unflatten(1, pairs).unbind(2)
        whole_l, whole_r = whole.unflatten(1, pairs).unbind(2)
        scores_l, scores_r = scores.unflatten(1, pairs).unbind(2)
        late = queries.unflatten(1, tokens)[:, :, 1] * since_r.exp().unsqueeze(-2)
        early = keys.unflatten(1, tokens)[:, :, 0] * until_l.exp().unsqueeze(-2)
        across = late.flatten(2, 3) @ early.transpose(2, 3).flatten(2, 3).mT
        across = across.view_as(scores_r)
        upper = torch.cat([scores_l, torch.zeros_like(across)], -1)
        scores = torch.cat([upper, torch.cat([across, scores_r], -1)], 2)
        since = torch.cat([since_l, since_r + whole_l], 2)
        until = torch.cat([until_l + whole_r, until_r], 2)
        whole = whole_l + whole_r
    return scores.squeeze(1), since.squeeze(1), until.squeeze(1), whole.squeeze(1)
