"""Softmax attention over keys that carry a document and a position.

    q, k, v   queries, keys, values; h heads share h_kv = h / group keys (grouped queries)
    t, s      number of queries, of keys
    d         head_dim
    document  which document of a row a token belongs to: 0 continues the carried state,
              1, 2, ... start in this call, -1 is nobody's (a dead cache slot)
    position  place within the document, from 0

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1. Grouped queries: Ainslie et al. 2023,
arXiv:2305.13245. ALiBi: Press et al. 2021, arXiv:2108.12409. Soft cap: Gemma 2, arXiv:2408.00118.
Sinks: gpt-oss, arXiv:2508.10925.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops import devices
from kizzasi.models.ops.documents import all_finite
from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.precision import full_precision


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    causal: bool = True,
    scale: float | None = None,
    finite: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend by the formula, with the scores written out.

        z = scale q k^T;    z = c tanh(z / c) if softcap c;    y = softmax(z + bias) v

    A sink is one more score in the softmax, whose key has the value zero.

    This is the definition; `attention` must agree with it. O(t s) memory.

    Args:
        q: (b, h, t, d).
        k: (b, h_kv, s, d) with h_kv a divisor of h.
        v: (b, h_kv, s, any width).
        visible: bool, broadcastable to (b, h, t, s), True where a query may look at a key; every
            query must see a key, and NaN in those that it does not see touches nothing. None: as
            `causal` says.
        bias: broadcastable to (b, h, t, s), added to the scores.
        softcap: bound on the size of the scores.
        causal: the last query sees every key, each one before it one key less; False: all see all.
        scale: of the scores; None means 1 / sqrt(d).
        finite: the caller knows that the keys and values that nobody sees are finite.
        sinks: (h,), a score for each head that every query sees.

    Returns:
        (b, h, t, width of v) in q's dtype. The softmax is taken in at least float32.
    """
    if visible is not None and not finite:
        run = partial(_formula, bias=bias, softcap=softcap, scale=scale, sinks=sinks)
        return shielded(run, q, k, v, visible)
    if visible is None and causal:
        visible = _earlier(q, k)
    return _formula(q, k, v, visible, bias=bias, softcap=softcap, scale=scale, sinks=sinks)


def _formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    *,
    bias: Tensor | None,
    softcap: float | None,
    scale: float | None,
    sinks: Tensor | None,
) -> Tensor:
    k, v = _expand(q, k), _expand(q, v)
    scores = full_precision(q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = torch.where(visible, scores, -torch.inf)
    if sinks is None:
        return scores.softmax(dim=-1).to(v.dtype) @ v
    sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, sink], -1).softmax(dim=-1)
    return weights[..., :-1].to(v.dtype) @ v


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    causal: bool = True,
    scale: float | None = None,
    finite: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attention_ref` by torch's fused kernels, except for capped scores, which they lack."""
    if softcap is not None:
        return attention_ref(
            q,
            k,
            v,
            visible=visible,
            bias=bias,
            softcap=softcap,
            causal=causal,
            scale=scale,
            finite=finite,
            sinks=sinks,
        )
    if visible is not None and not finite:
        return shielded(partial(_fused, bias=bias, scale=scale, sinks=sinks), q, k, v, visible)
    causal = causal and visible is None and q.shape[2] > 1
    if causal and (bias is not None or q.shape[2] != k.shape[2]):  # what the kernels cannot say
        visible, causal = _earlier(q, k), False
    return _fused(q, k, v, visible, bias=bias, scale=scale, causal=causal, sinks=sinks)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    *,
    bias: Tensor | None,
    scale: float | None,
    causal: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    if sinks is not None:
        by = q.shape[-1] ** -0.5 if scale is None else scale
        return _beside_sinks(q, k, v, visible, bias, by, causal, sinks)
    mask = visible
    if bias is not None:
        mask = bias.to(q.dtype)
        mask = mask if visible is None else mask.masked_fill(~visible, -torch.inf)
    grouped = q.shape[1] != k.shape[1]
    if grouped and _expands(q, mask):
        k, v, grouped = _expand(q, k), _expand(q, v), False
    width, lacking = v.shape[-1], k.shape[-1] - v.shape[-1]
    if lacking > 0 and q.shape[2] > 1:  # without it, torch takes no flash but writes scores out
        v = F.pad(v, (0, lacking))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return y[..., :width]


def _beside_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    bias: Tensor | None,
    scale: float,
    causal: bool,
    sinks: Tensor,
) -> Tensor:
    """A first key whose score with every query is the sink, by one more entry of each head, and
    whose value is zero. Kernels take a score for no key, and masks only where they must: to see
    the sink without one, the queries of a causal call have a first one too, which is dropped."""
    sink = (sinks / scale).to(q.dtype)[:, None, None].expand(*q.shape[:-1], 1)
    q, k, v = torch.cat([q, sink], -1), F.pad(k, (0, 1, 1, 0)), F.pad(v, (0, 1, 1, 0))
    first = k.new_zeros(k.shape[2], k.shape[3])
    first[0, -1] = 1
    k = k + first
    if causal:
        q = F.pad(q, (0, 0, 1, 0))
    if visible is not None:
        visible = F.pad(visible, (1, 0), value=True)
    if bias is not None:
        bias = F.pad(bias, (1, 0))
    y = _fused(q, k, v, visible, bias=bias, scale=scale, causal=causal)
    return y[:, :, causal:, :-1]


def _expands(q: Tensor, mask: Tensor | None) -> bool:
    """The rule. Of CUDA's kernels, flash refuses masks and the memory-efficient one shared keys;
    with both there remains the one that writes the scores out."""
    return devices.on_cuda(q) and mask is not None


def _expand(q: Tensor, k: Tensor) -> Tensor:
    """Keys or values (b, h_kv, s, n) once for every query head."""
    group = q.shape[1] // k.shape[1]
    return k if group == 1 else k.repeat_interleave(group, dim=1)


def shielded(
    run: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
) -> Tensor:
    """run(q, k, v, visible), where a weight of zero hides NaN and infinities too: a query that sees
    one, or is one, gets NaN, and no gradient passes through it; others are as if it were zero."""
    if all_finite(q, k, v):
        return run(q, k, v, visible)
    odd_q = ~q.isfinite().all(-1).all(1)
    odd_k = ~(k.isfinite().all(-1) & v.isfinite().all(-1)).all(1)
    q = q.masked_fill(odd_q[:, None, :, None], 0.0)
    k, v = (x.masked_fill(odd_k[:, None, :, None], 0.0) for x in (k, v))
    sick = (visible & odd_k[:, None, None]).any(-1).any(1) | odd_q
    return run(q, k, v, visible).masked_fill(sick[:, None, :, None], torch.nan)


def _earlier(q: Tensor, k: Tensor) -> Tensor:
    """(t, s) bool: the last query sees every key, each one before it one key less."""
    t, s = q.shape[2], k.shape[2]
    return torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)


def document_positions(starts: Tensor, next_position: Tensor) -> tuple[Tensor, Tensor]:
    """Number the documents of every row, and the tokens of every document.

    Args:
        starts: (b, t) bool, True where a document begins.
        next_position: (b,) int64, position of the first token if it continues the state.

    Returns:
        document and position, each (b, t) int64.
    """
    index = torch.arange(starts.shape[1], device=starts.device)
    origin = torch.where(starts, index, -next_position[:, None]).cummax(dim=1).values
    return starts.cumsum(dim=1), index - origin


def visibility(
    query_document: Tensor,
    query_position: Tensor,
    key_document: Tensor,
    key_position: Tensor,
    window: int | None = None,
    causal: bool = True,
) -> Tensor:
    """(b, 1, t, s) bool: same document, not later, and among the latest `window` positions.

    Args:
        query_document, query_position: (b, t).
        key_document, key_position: (b, s).
        window: positions that a query sees, its own included; None means all.
        causal: if False, later keys are seen too, as far ahead as behind.
    """
    now, then = query_position[:, :, None], key_position[:, None]  # no (b, t, s) but of bools
    visible = query_document[:, :, None] == key_document[:, None]
    if causal:
        visible &= then <= now
    if window is not None:
        visible &= then > now - window
        if not causal:
            visible &= then < now + window
    return visible[:, None]


def alibi_slopes(n_heads: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(n_heads,) how fast the score of a key falls with its distance, per head.

        slope[i] = 2 ** (-8 (i + 1) / n)     for n heads, n a power of two

    Other head counts take every other slope of the next power of two after those of the last one.

    Source: arXiv:2108.12409, section 3, and the published code for other head counts.
    """
    n = 1 << (n_heads.bit_length() - 1)
    first = torch.arange(1, n + 1, device=device, dtype=dtype) * (8 / n)
    between = (torch.arange(n_heads - n, device=device, dtype=dtype) * 2 + 1) * (4 / n)
    return torch.exp2(-torch.cat([first, between]))


ATTENTION = Engines("attention", reference=attention_ref, torch=attention)
