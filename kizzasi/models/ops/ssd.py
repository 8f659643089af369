"""State space duality: linear recurrences with one decay per head, computed as matrix products.

b batch · t time · h heads · g groups of heads that share B and C, r heads in each · c chunk size ·
z number of chunks

| here | paper | meaning |
|---|---|---|
| x (b,t,h,p) | X, P | what is written, one value of p channels per head |
| B, C (b,t,g,n) | B, C, N | under which key it is written, with which key memory is read |
| log_decay (b,t,h) | log a = Delta A | logarithm of what memory keeps from token to token, <= 0 |
| state (b,h,p,n) | H | the memory |

Mamba-2 is `ssd`; Mamba-3 is `trapezoid`, which needs one `ssd` and elementwise work.

Source: Dao & Gu 2024, arXiv:2405.21060, sections 5 and 6; Mamba-3: arXiv:2603.15569, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kizzasi.errors import ShapeError
from kizzasi.models.ops.chunks import chunks
from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.precision import in_full_precision
from kizzasi.models.ops.shapes import Shapes

# x, log_decay, B, C, the memory before and starts, to y and the memory after.
Core = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
CHUNK_SIZE = 64
FORGET = -1e3  # exp of it, and of anything below, is exactly zero in float64


@in_full_precision
def ssd_ref(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fade, write and read one matrix memory per head, one token at a time.

        H[t] = exp(log_decay[t]) H[t-1] + x[t] B[t]^T,      H[-1] = state (zeros if None)
        y[t] = H[t] C[t]

    This loop is the definition; `ssd` must agree with it.

    Args:
        x: (b, t, h, p) values, t >= 1, in at least float32 like everything else here.
        log_decay: (b, t, h), <= 0.
        B, C: (b, t, g, n) keys that write and keys that read; head i is of group i g / h.
        state: (b, h, p, n) memory carried in from earlier tokens.
        starts: (b, t) bool, True where the memory is emptied before the token.

    Returns:
        y (b, t, h, p), and the last H (b, h, p, n).

    Raises:
        ShapeError: a shape disagrees with those of x and B; the message shows both.
    """
    h = _prepare(x, log_decay, B, C, state, starts)
    ys = []
    for t in range(x.shape[1]):
        if starts is not None:
            h = h.masked_fill(starts[:, t, None, None, None], 0.0)
        y, h = ssd_step(h, x[:, t], log_decay[:, t], B[:, t], C[:, t])
        ys.append(y)
    return torch.stack(ys, 1), h


@in_full_precision
def ssd(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd_ref`, chunk by chunk: the same arguments, results and errors.

    With a[i, j] the product of the decays after token j up to token i of a chunk entered with H,

        y[i] = sum_{j<=i} a[i, j] (C[i] . B[j]) x[j]  +  a[i, start] H C[i]

    and H passes from chunk to chunk. Every exponent is a difference of sums that is <= 0. The sums
    are in float64: each is the difference of two that count from the chunk's start, and float32
    would lose the digits of a weak decay beside the -1000 of a start or of a strong one before it.
    They are one number a token and head, so that slow float64 (consumer GPUs) costs little; a
    device that has none (MPS) cannot run this form.

    Differs: with `starts`, a memory that grew infinite out of finite numbers is not forgotten (0
    times infinity is NaN); NaN and infinities that come in stay in their document.
    """
    return run_ssd(_by_chunks, x, log_decay, B, C, state, starts)


def run_ssd(
    core: Core,
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`ssd` by any core."""
    h = _prepare(x, log_decay, B, C, state, starts)

    def run(x: Tensor, B: Tensor, C: Tensor, log_decay: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return core(x, log_decay, B, C, h, starts)

    return isolated(run, starts, (x, B, C), (log_decay,), (h,))


def _by_chunks(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    (b, t, n_heads, p), groups = x.shape, B.shape[2]
    c = min(CHUNK_SIZE, t)
    log_decay = log_decay.clamp(min=FORGET)  # sums of -inf have no differences
    if starts is not None:
        log_decay = log_decay.masked_fill(starts.unsqueeze(-1), FORGET)
    x, B, C = (_chunks(v, c, groups) for v in (x, B, C))
    log_decay = _chunks(log_decay.unsqueeze(-1), c, groups)
    upto = log_decay.double().cumsum(1).transpose(1, 2)  # (bzg, r, c): decay up to each token
    later = torch.ones(c, c, dtype=torch.bool, device=x.device).triu(1)
    between = (upto.unsqueeze(-1) - upto.unsqueeze(-2)).to(x.dtype).masked_fill(later, -torch.inf)
    enter = upto.to(x.dtype).exp()
    leave = (upto[..., -1:] - upto).to(x.dtype).exp()

    # The memory that every chunk is entered with.
    written = (x.unflatten(-1, (-1, p)) * leave.mT.unsqueeze(-1)).flatten(-2).mT @ B
    written = written.reshape(b, -1, n_heads, p, B.shape[-1])
    kept = enter[..., -1].reshape(b, -1, n_heads, 1, 1)
    entered = []
    for kept_k, written_k in zip(kept.unbind(1), written.unbind(1), strict=True):
        entered.append(h)
        h = torch.addcmul(written_k, kept_k, h)

    # x and y by head: (bzg, r, c, p).
    scores = (C @ B.mT).unsqueeze(1) * between.exp()
    own = scores @ x.unflatten(-1, (-1, p)).transpose(1, 2)
    memory = torch.stack(entered, 1).view(len(B), -1, B.shape[-1])
    carried = (C @ memory.mT).unflatten(-1, (-1, p)).transpose(1, 2)
    y = torch.addcmul(own, carried, enter.unsqueeze(-1))
    y = rearrange(y, "(b z g) r c p -> b (z c) (g r) p", b=b, g=groups)
    return y[:, :t], h


@in_full_precision
def ssd_step(
    state: Tensor, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `ssd_ref`: x (b, h, p), log_decay (b, h), B and C (b, g, n) -> y, new state."""
    B, C = (v.repeat_interleave(x.shape[1] // v.shape[1], 1) for v in (B, C))
    fade = log_decay.exp()[..., None, None]
    state = torch.addcmul(state * fade, x.unsqueeze(-1), B.unsqueeze(-2))
    return (state * C.unsqueeze(-2)).sum(-1), state


def ssd_step_(state: Tensor, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`ssd_step` of inputs of one dtype, with the new state written into `state`."""
    (b, h, p), (g, n) = x.shape, B.shape[1:]
    state.mul_(log_decay.exp().view(b, h, 1, 1))
    groups = state.view(b, g, h // g * p, n)  # the heads of a group read and write alike
    groups.addcmul_(x.reshape(b, g, -1, 1), B.unsqueeze(-2))
    return (groups @ C.unsqueeze(-1)).view(b, h, p)


def ssd_flops(batch: int, seq_len: int, heads: int, groups: int, p: int, n: int) -> int:
    """Work of the matrix products of `ssd`; a multiply-add counts 2."""
    c = min(CHUNK_SIZE, seq_len)
    tokens = batch * -(-seq_len // c) * c
    return 2 * tokens * (c * (groups * n + heads * p) + 2 * heads * p * n)


class TrapezoidState(NamedTuple):
    """What the trapezoidal rule carries: the memory, and what the last token wrote, under what key.

    h: (b, h, p, n). B: (b, h, n). x: (b, h, p).
    """

    h: Tensor
    B: Tensor
    x: Tensor


@in_full_precision
def trapezoid_ref(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    share: Tensor,
    B: Tensor,
    C: Tensor,
    state: TrapezoidState,
    starts: Tensor | None = None,
) -> tuple[Tensor, TrapezoidState]:
    """As `ssd_ref`, with each step's input averaged over its two ends.

        H[t] = a H[t-1] + (1 - share) dt a x[t-1] B[t-1]^T + share dt x[t] B[t]^T
        y[t] = H[t] C[t]                               with a = exp(log_decay), all at t

    share = 1/2 is the trapezoidal rule, share = 1 is Euler's. This loop is the definition;
    `trapezoid` must agree with it.

    Args:
        x: (b, t, h, p) values, t >= 1.
        dt: (b, t, h) step sizes.
        log_decay: (b, t, h), <= 0.
        share: (b, t, h) in [0, 1], the weight of the step's right end.
        B, C: (b, t, h, n).
        state: of earlier tokens; zeros before any.
        starts: (b, t) bool, True where a document starts: what came before it counts as zero.

    Returns:
        y (b, t, h, p), and the state after the last token.

    Source: Mamba-3, arXiv:2603.15569, section 3.1.
    """
    ys = []
    for t in range(x.shape[1]):
        if starts is not None:
            first = starts[:, t, None, None]
            state = TrapezoidState(
                state.h.masked_fill(first.unsqueeze(-1), 0.0),
                state.B.masked_fill(first, 0.0),
                state.x.masked_fill(first, 0.0),
            )
        token = (v[:, t] for v in (x, dt, log_decay, share, B, C))
        y, state = trapezoid_step(state, *token)
        ys.append(y)
    return torch.stack(ys, 1), state


@in_full_precision
def trapezoid(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    share: Tensor,
    B: Tensor,
    C: Tensor,
    state: TrapezoidState,
    starts: Tensor | None = None,
) -> tuple[Tensor, TrapezoidState]:
    """`trapezoid_ref` by `ssd`: the same arguments and results.

    What a token adds at the next step fades as its own share does, so it may be written at once,
    with weight share[t] dt[t] + after[t], where after[t] = (1 - share[t+1]) dt[t+1]. Only the token
    itself reads that too early, and gets it taken off: y[t] -= after[t] (B[t] . C[t]) x[t].
    """
    return run_trapezoid(_by_chunks, x, dt, log_decay, share, B, C, state, starts)


def run_trapezoid(
    core: Core,
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    share: Tensor,
    B: Tensor,
    C: Tensor,
    state: TrapezoidState,
    starts: Tensor | None,
) -> tuple[Tensor, TrapezoidState]:
    """`trapezoid` by any core of `ssd`."""

    def run(
        x: Tensor,
        dt: Tensor,
        share: Tensor,
        B: Tensor,
        C: Tensor,
        log_decay: Tensor,
        *state: Tensor,
    ) -> tuple[Tensor, TrapezoidState]:
        return _by_ssd(core, x, dt, log_decay, share, B, C, TrapezoidState(*state), starts)

    return isolated(run, starts, (x, dt, share, B, C), (log_decay,), state)


def _by_ssd(
    core: Core,
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    share: Tensor,
    B: Tensor,
    C: Tensor,
    state: TrapezoidState,
    starts: Tensor | None,
) -> tuple[Tensor, TrapezoidState]:
    left = (1.0 - share) * dt
    after = F.pad(left[:, 1:], (0, 0, 0, 1)).unsqueeze(-1)
    weight = torch.addcmul(after, share.unsqueeze(-1), dt.unsqueeze(-1))
    before = (left[:, 0].unsqueeze(-1) * state.x).unsqueeze(-1)
    h = torch.addcmul(state.h, before, state.B.unsqueeze(-2))
    h = _prepare(x, log_decay, B, C, h, starts)
    y, h = core(weight * x, log_decay, B, C, h, starts)
    y = torch.addcmul(y, after * (B * C).sum(-1, keepdim=True), x, value=-1.0)
    return y, TrapezoidState(h, B[:, -1].clone(), x[:, -1].clone())


@in_full_precision
def trapezoid_step(
    state: TrapezoidState,
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    share: Tensor,
    B: Tensor,
    C: Tensor,
) -> tuple[Tensor, TrapezoidState]:
    """One token of `trapezoid_ref`: inputs without their time dimension -> y (b, h, p), state."""
    before = (((1.0 - share) * dt).unsqueeze(-1) * state.x).unsqueeze(-1)
    h = torch.addcmul(state.h, before, state.B.unsqueeze(-2))
    y, h = ssd_step(h, (share * dt).unsqueeze(-1) * x, log_decay, B, C)
    return y, TrapezoidState(h, B, x)


SHAPES = Shapes(
    x="b t h p", B="b t g n", C="b t g n", log_decay="b t h", state="b h p n", starts="b t"
)


def _prepare(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    starts: Tensor | None,
) -> Tensor:
    """Check shapes; the memory before the first token."""
    b, _, h, p, g, n = SHAPES(x, B, C, log_decay, state, starts)
    if h % g:
        raise ShapeError(f"x has h = {h} heads, B g = {g} groups; make g a divisor of h")
    return x.new_zeros(b, h, p, n) if state is None else state


def _chunks(v: Tensor, c: int, groups: int) -> Tensor:
    """(b, t, g r, k) to (b z g, c, r k). Zeros fill the last chunk: they do not write or decay."""
    return rearrange(chunks(v, c), "b z c (g r) k -> (b z g) c (r k)", g=groups)


NATIVE, TRITON = (f"kizzasi.models.ops.{engine}.memory" for engine in ("native", "triton"))
SSD = Engines("ssd", reference=ssd_ref, torch=ssd, native=f"{NATIVE}:ssd", triton=f"{TRITON}:ssd")
TRAPEZOID = Engines(
    "trapezoid",
    reference=trapezoid_ref,
    torch=trapezoid,
    native=f"{NATIVE}:trapezoid",
    triton=f"{TRITON}:trapezoid",
)
