"""Softmax attention whose scores fade by what the tokens in between forget.

    q, k, v   queries, keys, values; h heads share h_kv = h / group keys
    t, s      number of queries, of keys; the last t keys are the queries' own tokens
    f         what a head keeps at a token of all that came before it, in (0, 1]
    faded     sum of log f over the tokens after a key up to a later one: what its score has lost

Source: Lin et al. 2025, arXiv:2503.02130, sections 3.1 and 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops.attention import attention, attention_ref
from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.precision import full_precision

BLOCK = 128  # queries that meet their keys together


def forgetting_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    faded: Tensor,
    *,
    visible: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend one query at a time.

        z[i, j] = q[i] . k[j] / sqrt(d) + sum_{l = j+1 .. i} log f[l];    y = softmax(z) v

    This loop is the definition; `forgetting_attention` must agree with it. O(t) steps.

    Args:
        q: (b, h, t, d).
        k: (b, h_kv, s, d) with h_kv a divisor of h.
        v: (b, h_kv, s, any width).
        log_f: (b, h, t), <= 0.
        faded: (b, h, s - t) of the keys before this call's tokens, up to the last one before them.
        visible: bool, broadcastable to (b, h, t, s), True where a query may look at a key, never at
            a later one; each sees its own. What it does not see may be NaN. None: all earlier ones.
        window: a query sees none of the keys that stand so many places or more before its own. This
            loop need not know: `visible` says so too.

    Returns:
        (b, h, t, width of v) in q's dtype.
    """
    ys, log_f, faded = [], full_precision(log_f), full_precision(faded)
    for i in range(q.shape[2]):
        faded = F.pad(faded + log_f[:, :, i : i + 1], (0, 1))
        n = faded.shape[2]
        seen = None if visible is None else visible[:, :, i : i + 1, :n]
        query, bias = q[:, :, i : i + 1], faded.unsqueeze(2)
        ys.append(attention_ref(query, k[:, :, :n], v[:, :, :n], visible=seen, bias=bias))
    return torch.cat(ys, 2)


def forgetting_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    faded: Tensor,
    *,
    visible: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """`forgetting_attention_ref` in blocks of queries, each with the keys that it may see.

    At the end of a block its own keys join the faded ones: a bias is a sum of log f, never the
    difference of two sums that have grown with the length.

    Args, Returns: as there, but that keys stand in the order of their positions.
    """
    ys, log_f, faded = [], full_precision(log_f), full_precision(faded)
    n_before, t = faded.shape[2], q.shape[2]
    for begin in range(0, t, BLOCK):
        end = min(begin + BLOCK, t)
        within = _sums_between(log_f[:, :, begin:end])
        since = log_f[:, :, begin:end].cumsum(-1)
        first, last = _span(begin, n_before, window), n_before + end
        old = since.unsqueeze(-1) + faded[:, :, None, first:]
        seen = None if visible is None else visible[:, :, begin:end, first:last]
        ys.append(
            attention(
                q[:, :, begin:end],
                k[:, :, first:last],
                v[:, :, first:last],
                visible=seen,
                bias=torch.cat([old, within], -1),
            )
        )
        faded = torch.cat([faded + since[:, :, -1:], within[:, :, -1]], -1)
    return ys[0] if len(ys) == 1 else torch.cat(ys, 2)


def fading(log_f: Tensor) -> Tensor:
    """(b, h, t) of log f: the sum over the tokens after each, up to the last."""
    later = F.pad(full_precision(log_f)[:, :, 1:], (0, 1))
    return later.flip(-1).cumsum(-1).flip(-1)


def forgetting_flops(batch: int, seq_len: int, heads: int, d: int, window: int | None) -> int:
    """Of both products with the scores, masked ones too, from no keys on."""
    blocks = ((i, min(i + BLOCK, seq_len)) for i in range(0, seq_len, BLOCK))
    scores = sum((end - i) * (end - _span(i, 0, window)) for i, end in blocks)
    return 2 * (2 * batch * heads * scores * d)


def _span(begin: int, n_before: int, window: int | None) -> int:
    """The first key that a block of queries may see."""
    return 0 if window is None else max(0, n_before + begin - window + 1)


def _sums_between(x: Tensor) -> Tensor:
    """(b, h, c, c) of (b, h, c): [i, j] is the sum over j < l <= i, zero for later j."""
    c = x.shape[-1]
    after = torch.ones(c, c, dtype=torch.bool, device=x.device).tril(-1)
    return torch.where(after, x.unsqueeze(-1), 0.0).cumsum(-2)


FORGETTING_ATTENTION = Engines(
    "forgetting_attention", reference=forgetting_attention_ref, torch=forgetting_attention
)
