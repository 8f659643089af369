"""Softmax attention whose scores fade by what the tokens in between forget.

    q, k, v   queries, keys, values; h heads share h_kv = h / group keys
    t, s      number of queries, of keys; the last t keys are the queries' own tokens
    f         what a head keeps at a token of all that came before it, in (0, 1]
    faded     sum of log f over the tokens after a key up to a later one: what its score has lost

Source: Lin et al. 2025, arXiv:2503.02130, sections 3.1 and 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops import autodiff
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
    given = q, k, v, log_f, faded
    if _has_flash(q, visible):
        return _Flash.apply(*given, window)
    return _by_blocks(*given, visible, window)


def _by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    faded: Tensor,
    visible: Tensor | None,
    window: int | None,
) -> Tensor:
    ys = []
    for rows, keys, bias in _blocks(log_f, faded, window):
        seen = None if visible is None else visible[:, :, rows, keys]
        y = attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], visible=seen, bias=bias)
        ys.append(y)
    return ys[0] if len(ys) == 1 else torch.cat(ys, 2)


def _blocks(
    log_f: Tensor, faded: Tensor, window: int | None, least: Tensor | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries that meet their keys together, these keys, and what is added to their scores.

    least: (b, h), keys to whose scores no query adds as much are left out, up to the first that
    some query does.
    """
    log_f, faded = full_precision(log_f), full_precision(faded)
    n_before, t = faded.shape[2], log_f.shape[2]
    for begin in range(0, t, BLOCK):
        end = min(begin + BLOCK, t)
        within = _sums_between(log_f[:, :, begin:end])
        since = log_f[:, :, begin:end].cumsum(-1)
        first, last = _span(begin, n_before, window), n_before + end
        if least is not None:
            gone = (faded[:, :, first:] + since[:, :, :1] < least[:, :, None]).all(1).all(0)
            first += int(gone.int().cumprod(0).sum())
        old = since.unsqueeze(-1) + faded[:, :, None, first:]
        yield slice(begin, end), slice(first, last), torch.cat([old, within], -1)
        faded = torch.cat([faded + since[:, :, -1:], within[:, :, -1]], -1)


class _Flash(torch.autograd.Function):
    """The same blocks by the flash kernels of a CPU, which have no gradient for what is added to
    scores: torch would write all scores out for one.

        z[i, j] = q[i] . k[j] / sqrt(d) + F[i] - F[j],      F running sums of log f

    Those of a row of dz add up to zero, so F[i] gets nothing and -F[j] the sum of column j, which
    is what one more entry of k[j] would get if q[i] had a one there.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_f: Tensor,
        faded: Tensor,
        window: int | None,
    ) -> Tensor:
        wide = _expanded(q, k, v)
        ys, sums = [], []
        for rows, keys, mask in _masks(q, k, log_f, faded, window):
            y, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                wide[0][:, :, rows],
                wide[1][:, :, keys],
                wide[2][:, :, keys],
                attn_mask=mask,
                scale=q.shape[-1] ** -0.5,
            )
            ys.append(y)
            sums.append(total)
        y = torch.cat(ys, 2)[..., : v.shape[-1]]
        ctx.window = window
        ctx.save_for_backward(q, k, v, log_f, faded, y, *sums)
        return y

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, log_f, faded, y, *sums = ctx.saved_tensors
        if autodiff.too_narrow(dy):
            run = partial(_by_blocks, visible=None, window=ctx.window)
            return *autodiff.gradients(run, (q, k, v, log_f, faded), (dy,)), None
        h, d, m = q.shape[1], q.shape[-1], v.shape[-1]
        wide_q, wide_k, wide_v = _expanded(q, k, v, 1)
        wide_q[..., d:] = 1
        dq, dk, dv = q.new_empty(q.shape), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
        lacking = wide_q.shape[-1] - m
        totals = iter(sums)
        for rows, keys, mask in _masks(q, k, log_f, faded, ctx.window):
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                F.pad(dy[:, :, rows], (0, lacking)),
                wide_q[:, :, rows],
                wide_k[:, :, keys],
                wide_v[:, :, keys],
                F.pad(y[:, :, rows], (0, lacking)),
                next(totals),
                0.0,
                False,
                attn_mask=mask,
                scale=d**-0.5,
            )
            dq[:, :, rows] = found[0][..., :d]
            dk[:, :, keys] += found[1]
            dv[:, :, keys] += found[2]
        columns = dk[..., d].to(log_f.dtype) * d**0.5
        n_before = faded.shape[2]
        dlog_f = -columns[:, :, n_before:].flip(-1).cumsum(-1).flip(-1)
        dk, dv = (x.unflatten(1, (-1, h // k.shape[1])).sum(2) for x in (dk[..., :d], dv[..., :m]))
        return dq, dk, dv, dlog_f, columns[:, :, :n_before].to(faded.dtype), None


def _expanded(q: Tensor, k: Tensor, v: Tensor, more: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """All with the heads of q and one width, by zeros at the end, at least `more` of q's."""
    width = max(q.shape[-1] + more, v.shape[-1])
    group = q.shape[1] // k.shape[1]
    k, v = (x if group == 1 else x.repeat_interleave(group, 1) for x in (k, v))
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return q, k, v


def _masks(
    q: Tensor, k: Tensor, log_f: Tensor, faded: Tensor, window: int | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """`_blocks`, with -inf for keys that come later or have faded to nothing.

    No z of a head is larger than U = max |q| max |k| / sqrt(d), and that of a query with itself not
    smaller than -U: where 2 U and what is added come below log w, the weight is below w. It is left
    out for w the root of the smallest normal number, 1e-19 in float32: it would cost as much as
    others, and more where its products are no normal numbers.

    Source: Lin et al. 2025, arXiv:2504.06949, section 3.
    """
    longest = [full_precision(x).norm(dim=-1).amax(-1) for x in (q, k)]
    largest = longest[0] * longest[1].repeat_interleave(q.shape[1] // k.shape[1], 1)
    least = math.log(torch.finfo(largest.dtype).tiny) / 2 - 2 * largest * q.shape[-1] ** -0.5
    for rows, keys, bias in _blocks(log_f, faded, window, least):
        c, n = bias.shape[2:]
        later = torch.ones(c, n, dtype=torch.bool).triu(1 + n - c)
        gone = (bias < least[:, :, None, None]).logical_or_(later)
        yield rows, keys, bias.masked_fill_(gone, -torch.inf).to(q.dtype)


def _has_flash(q: Tensor, visible: Tensor | None) -> bool:
    """The rule: on a CPU, where every query sees all before it, unless torch looks on."""
    return q.device.type == "cpu" and visible is None and not autodiff.observed()


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
