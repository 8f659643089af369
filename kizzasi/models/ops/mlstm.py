"""mLSTM: a matrix memory with exponential input gates, read relative to what was written in all.

Symbols: b batch, t time, h heads, n channels of a key, p channels of a value, c chunk size.

| here | paper | meaning |
|---|---|---|
| log_i, log_f | i~, log sigma(f~) | logarithms of the input gate and the forget gate (<= 0) |
| C (b,h,n,p) | C_t | memory, indexed [key, value] |
| n (b,h,n) | n_t | the keys written, as they fade: the normaliser |
| m (b,h) | m_t | logarithm by which C and n are divided, so that no gate overflows |

Source: Beck et al. 2024, arXiv:2405.04517, section 2.3; Beck et al. 2025, arXiv:2503.13427.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kizzasi.models.ops.chunks import chunk_size, chunks
from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.precision import full_precision

CHUNK_SIZE = 64  # a power of two
EPS = 1e-6
LOWEST = -80.0  # below it exp(-m) would leave float32; outputs are 0 there in any case


class MLSTMMemory(NamedTuple):
    """C (b, h, n, p), n (b, h, n) and m (b, h); all zero before any token."""

    C: Tensor
    n: Tensor
    m: Tensor


def mlstm_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    memory: MLSTMMemory | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, MLSTMMemory]:
    """Write to and read from a gated matrix memory, one token at a time.

        m[t] = max(log_f[t] + m[t-1], log_i[t])
        C[t] = exp(log_f[t] + m[t-1] - m[t]) C[t-1] + exp(log_i[t] - m[t]) k[t] v[t]^T
        n[t] = exp(log_f[t] + m[t-1] - m[t]) n[t-1] + exp(log_i[t] - m[t]) k[t]
        y[t] = C[t]^T q[t] / (max(|n[t] . q[t]|, exp(-m[t])) + 1e-6)

    This loop is the definition; `mlstm` must agree with it. O(t) steps.

    Args:
        q, k: (b, t, h, n), t >= 1; q already scaled.
        v: (b, t, h, p).
        log_i, log_f: (b, t, h); -inf writes nothing, forgets everything.
        memory: carried in; zeros if None.
        starts: (b, t) bool, True where the memory is emptied before the token.

    Returns:
        (b, t, h, p) every y[t], and the memory after the last, in at least float32.
    """
    q, k, v, log_i, log_f = (full_precision(x) for x in (q, k, v, log_i, log_f))
    memory = _empty(q, v) if memory is None else memory
    ys = []
    for t in range(q.shape[1]):
        if starts is not None:
            new = starts[:, t]
            memory = MLSTMMemory(
                *(x.masked_fill(new.view(-1, *[1] * (x.ndim - 1)), 0.0) for x in memory)
            )
        y, memory = mlstm_step(memory, q[:, t], k[:, t], v[:, t], log_i[:, t], log_f[:, t])
        ys.append(y)
    return torch.stack(ys, 1), memory


def mlstm_step(
    memory: MLSTMMemory, q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor
) -> tuple[Tensor, MLSTMMemory]:
    """One token of `mlstm_ref`: q, k (b, h, n), v (b, h, p), gates (b, h); y (b, h, p)."""
    q, k, v, log_i, log_f = (full_precision(x) for x in (q, k, v, log_i, log_f))
    faded = log_f + memory.m
    m = torch.maximum(faded, log_i)
    keep, write = (faded - m).exp().unsqueeze(-1), (log_i - m).exp().unsqueeze(-1)
    k = write * k
    C = torch.addcmul(k.unsqueeze(-1) * v.unsqueeze(-2), keep.unsqueeze(-1), memory.C)
    n = torch.addcmul(k, keep, memory.n)
    y = (q.unsqueeze(-2) @ C).squeeze(-2)
    return y / _size((n * q).sum(-1), m).unsqueeze(-1), MLSTMMemory(C, n, m)


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    memory: MLSTMMemory | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, MLSTMMemory]:
    """Compute what `mlstm_ref` computes, chunk by chunk, with matrix products.

    Within a chunk, with G[t] the sum of log_f up to t, token s reaches token t by the logarithm
    G[t] - G[s] + log_i[s], and the memory that enters by G[t] + m; m[t] is the largest of them.

    Differs: with `starts`, a memory that became infinite out of finite numbers is not forgotten.
    """
    q, k, v, log_i, log_f = (full_precision(x) for x in (q, k, v, log_i, log_f))
    memory = _empty(q, v) if memory is None else memory
    t, c = q.shape[1], chunk_size(q.shape[1], CHUNK_SIZE)

    def run(
        q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, *memory: Tensor
    ) -> tuple[Tensor, MLSTMMemory]:
        q, k, v, log_f = (chunks(x, c) for x in (q, k, v, log_f))
        log_i = chunks(log_i, c, -torch.inf)  # what fills up writes nothing and forgets nothing
        new = None if starts is None else chunks(starts, c).unbind(1)
        ys, after = [], MLSTMMemory(*memory)
        for z, (q_, k_, v_, i, f) in enumerate(
            zip(*(x.unbind(1) for x in (q, k, v, log_i, log_f)), strict=True)
        ):
            y, after = _chunk(after, q_, k_, v_, i, f, None if new is None else new[z])
            ys.append(y)
        return torch.cat(ys, 1)[:, :t], after

    return isolated(run, starts, (q, k, v), (log_i, log_f), memory)


def _chunk(
    memory: MLSTMMemory,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, MLSTMMemory]:
    """One chunk of `mlstm`: its outputs (b, c, h, p) and the memory after it."""
    q, k, v, log_i, log_f = (x.transpose(1, 2) for x in (q, k, v, log_i, log_f))  # (b, h, c, ...)
    c = q.shape[2]
    total = log_f.cumsum(-1)
    index = torch.arange(c, device=q.device)
    sees = index[:, None] >= index
    entering, begun = total + memory.m.unsqueeze(-1), None
    if starts is not None:
        begin = torch.where(starts, index + 1, 0).cummax(-1).values[:, None]  # 0: it goes on
        sees = sees & (begin.unsqueeze(-1) == begin.unsqueeze(-2))
        before = (total - log_f).gather(-1, (begin - 1).clamp(min=0).expand_as(total))
        begun = begin > 0
        entering = torch.where(begun, total - before, entering)
    reach = total.unsqueeze(-1) - total.unsqueeze(-2) + log_i.unsqueeze(-2)
    reach = reach.masked_fill(~sees, -torch.inf)
    m = torch.maximum(entering, reach.amax(-1))
    weight, carried = (reach - m.unsqueeze(-1)).exp(), (entering - m).exp()
    if begun is not None:
        carried = carried.masked_fill(begun, 0.0)
    scores = (q @ k.mT) * weight
    y = torch.addcmul(scores @ v, carried.unsqueeze(-1), q @ memory.C)
    read = torch.addcmul(scores.sum(-1), carried, (q * memory.n.unsqueeze(-2)).sum(-1))
    y = y / _size(read, m).unsqueeze(-1)
    kept, written = carried[..., -1:], k * weight[..., -1, :, None]
    return y.transpose(1, 2), MLSTMMemory(
        torch.addcmul(written.mT @ v, kept.unsqueeze(-1), memory.C),
        torch.addcmul(written.sum(-2), kept, memory.n),
        m[..., -1],
    )


def _size(read: Tensor, m: Tensor) -> Tensor:
    """What an output is divided by."""
    return torch.maximum(read.abs(), (-m.clamp(min=LOWEST)).exp()) + EPS


def mlstm_flops(batch: int, seq_len: int, heads: int, n: int, p: int) -> int:
    """Work of the matrix products of `mlstm`; a multiply-add counts 2."""
    c = chunk_size(seq_len, CHUNK_SIZE)
    tokens = batch * heads * -(-seq_len // c) * c
    return tokens * 2 * (c * (n + p) + 2 * n * p)


def _empty(q: Tensor, v: Tensor) -> MLSTMMemory:
    b, _, h, n = q.shape
    zeros = q.new_zeros(b, h, n, v.shape[-1])
    return MLSTMMemory(zeros, zeros[..., 0], zeros[..., 0, 0])


MLSTM_SCAN = Engines("mlstm", reference=mlstm_ref, torch=mlstm)
