"""Selective state space scan: the recurrence of Mamba.

Symbols: b batch, t time, d channels (d_inner), n states per channel (d_state), c steps in a chunk,
z number of chunks.

u input (x) · dt step size (Delta) · A decay rates · B, C input and output maps · D skip · h state
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops import autodiff, devices, scan_blocks
from kizzasi.models.ops.chunks import chunks
from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.shapes import Shapes

PIECE_STATES = 2**26  # b t d n that `selective_scan_chunked` holds at once: 256 MiB of float32


def selective_scan_ref(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run d independent diagonal state spaces whose step size, input and output maps are data.

        h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t],      h[-1] = h0 (zeros if None)
        y[t] = C[t] . h[t] + D u[t],      and with a gate that times silu(gate[t])

    This loop is the definition; `selective_scan` must agree with it.

    Args:
        u: (b, t, d) input, t >= 1.
        dt: (b, t, d) step size, positive.
        A: (d, n) decay rates, negative.
        B: (b, t, n) what each state takes from the input.
        C: (b, t, n) what the output takes from each state.
        D: (d,) skip connection, none if None.
        h0: (b, d, n) state carried in from earlier tokens.
        starts: (b, t) bool, True where a document starts: the state before that token is zero.
        gate: (b, t, d) or None.
        softplus: dt is given before its softplus.

    Returns:
        y (b, t, d) in u's dtype, and the last h (b, d, n). Sums are kept in float64 if u is
        float64, else in float32, which is also the dtype of h.

    Raises:
        ShapeError: a shape disagrees with those of u and A; the message shows both.

    Source: Gu & Dao 2023, arXiv:2312.00752, Algorithm 2 and section 3.3.
    Differs: as in the authors' code, B is discretised by Euler's rule, not zero-order hold.
    """
    u_, dt, A, B, C, D, h = _prepare(u, dt, A, B, C, D, h0, starts, gate)
    dt = F.softplus(dt) if softplus else dt
    ys = []
    for t in range(u.shape[1]):
        if starts is not None:
            h = h.masked_fill(starts[:, t, None, None], 0.0)
        decay = torch.exp(dt[:, t, :, None] * A)
        h = decay * h + (dt[:, t] * u_[:, t])[:, :, None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1) + D * u_[:, t])
    return _gated(torch.stack(ys, dim=1).to(u.dtype), gate), h


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """`selective_scan_ref`, fast: the same arguments, results and errors.

    On a CPU it works through time in blocks of a few tokens that stay in the cache; elsewhere all
    chunks run side by side, so that t tokens are 2 sqrt(t) calls (`_states`). Backward computes the
    states again, so that memory is that of a few (b, t, d) tensors and of one piece of the work,
    never (b, t, d, n).

    Differs: with `starts`, a state that grew infinite out of finite numbers is not forgotten (0
    times infinity is NaN); NaN and infinities that come in stay in their document.
    """
    u_, dt, A, B, C, D, h0 = _prepare(u, dt, A, B, C, D, h0, starts, gate)
    dt = F.softplus(dt) if softplus else dt

    def run(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        return _run(u, dt, A, B, C, D, h0, starts)

    y, h = isolated(run, starts, (u_, dt, B, C), (), (h0,))
    return _gated(y.to(u.dtype), gate), h


def _gated(y: Tensor, gate: Tensor | None) -> Tensor:
    return y if gate is None else y * F.silu(gate)


def _run(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The scan of inputs that `_prepare` has seen, in the form that the occasion asks for."""
    if autodiff.transformed():
        return selective_scan_chunked(*inputs)
    u, _, A, *_ = inputs
    pieces, steps = scan_blocks.cut_sizes(u, A.shape[1])
    keep = _by_blocks(u) and torch.is_grad_enabled()
    keep = keep and any(v is not None and v.requires_grad for v in inputs)
    if torch.compiler.is_compiling():
        y, h, _ = _scan_node(*inputs, keep, pieces, steps)
    else:
        y, h = _Scan.apply(*inputs, keep, pieces, steps)
    return y, h


def _by_blocks(u: Tensor) -> bool:
    """The rule: only a CPU is better off with a call per token over states that its cache holds."""
    return devices.on_cpu(u)


def selective_scan_step(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `selective_scan_ref`: u, dt (b, d); B, C (b, n); h (b, d, n) -> y (b, d), h."""
    wide = h.dtype
    u_, dt = u.to(wide), dt.to(wide)
    h = torch.addcmul(
        torch.exp(dt.unsqueeze(-1) * A) * h, (dt * u_).unsqueeze(-1), B.to(wide).unsqueeze(1)
    )
    y = (h * C.to(wide).unsqueeze(1)).sum(-1)
    return torch.addcmul(y, u_, D).to(u.dtype), h


def selective_scan_step_(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor
) -> Tensor:
    """`selective_scan_step` of inputs of one dtype, with the new state written into h."""
    decay = (dt.unsqueeze(-1) * A).exp_()
    h.mul_(decay).addcmul_((dt * u).unsqueeze(-1), B.unsqueeze(1))
    return torch.bmm(h, C.unsqueeze(-1)).squeeze(-1).addcmul_(u, D)


def selective_scan_chunked(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    h0: Tensor,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan_ref` of inputs of one dtype, in 2 sqrt(t) steps of plain torch operations.

    All states (b, t, d, n) are held. Differentiable as often as need be.
    """
    w = (dt * u).unsqueeze(-1) * B.unsqueeze(2)
    h, last = _states(dt.unsqueeze(-1) * A, w, h0, starts)
    return torch.addcmul((h @ C.unsqueeze(-1)).squeeze(-1), D, u), last


def _states(
    log_decay: Tensor, w: Tensor, h0: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Every h[t] = exp(log_decay[t]) h[t-1] + w[t] with h[-1] = h0, and the last.

    The c steps within a chunk are taken by all z chunks at once; then each chunk is entered with
    the end of the one before, which fades by the sum of the log decays since. No quotients, and no
    exponent above 0.

    Args:
        log_decay, w: (b, t, d, n); h0: (b, d, n); starts: (b, t) bool.
    """
    t = w.shape[1]
    c = 1 << ((t - 1).bit_length() + 1) // 2

    log_decay, w = chunks(log_decay, c), chunks(w, c)  # zeros neither fade nor write
    decay, since = log_decay.exp(), log_decay.cumsum(2).exp()
    if starts is not None:
        first = chunks(starts, c)[..., None, None]
        decay = decay.masked_fill(first, 0.0)
        since = since.masked_fill(first.cumsum(2) > 0, 0.0)
    within = [w[:, :, 0]]
    for decay_i, w_i in zip(decay.unbind(2)[1:], w.unbind(2)[1:], strict=True):
        within.append(torch.addcmul(w_i, decay_i, within[-1]))
    held = [h0]
    for since_k, end_k in zip(since[:, :, -1].unbind(1), within[-1].unbind(1), strict=True):
        held.append(torch.addcmul(end_k, since_k, held[-1]))
    h = torch.addcmul(torch.stack(within, 2), since, torch.stack(held[:-1], 1).unsqueeze(2))
    return h.flatten(1, 2)[:, :t], held[-1]


def _chunked_gradients(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    h0: Tensor,
    starts: Tensor | None,
    dy: Tensor,
    dh: Tensor,
) -> list[Tensor]:
    """Gradients of the first seven. Those of the states, g[t] = dy[t] C[t] + a[t+1] g[t+1], are the
    same recurrence in the other direction."""
    x, log_decay = dt * u, dt.unsqueeze(-1) * A
    h, _ = _states(log_decay, x.unsqueeze(-1) * B.unsqueeze(2), h0, starts)
    dC = (dy.unsqueeze(2) @ h).squeeze(2)
    h = torch.cat([h0.unsqueeze(1), h[:, :-1]], 1)  # from here on, the state before each token
    if starts is not None:
        h = h.masked_fill(starts[..., None, None], 0.0)
    later = F.pad(log_decay[:, 1:], (0, 0, 0, 0, 0, 1)).flip(1)
    resets = None if starts is None else F.pad(starts[:, 1:], (0, 1)).flip(1)
    g, _ = _states(later, (dy.unsqueeze(-1) * C.unsqueeze(2)).flip(1), dh, resets)
    g = g.flip(1)
    dx, dB = (g @ B.unsqueeze(-1)).squeeze(-1), (x.unsqueeze(2) @ g).squeeze(2)
    g = g * log_decay.exp()
    dh0 = g[:, 0] if starts is None else g[:, 0].masked_fill(starts[:, 0, None, None], 0.0)
    g = g * h  # the gradient of the exponent dt A
    ddt = torch.addcmul((g * A).sum(-1), dx, u)
    dA = (g * dt.unsqueeze(-1)).sum((0, 1))
    return [torch.addcmul(dx * dt, D, dy), ddt, dA, dB, dC, (dy * u).sum((0, 1)), dh0]


SHAPES = Shapes(
    u="b t d",
    dt="b t d",
    A="d n",
    B="b t n",
    C="b t n",
    D="d",
    h0="b d n",
    starts="b t",
    gate="b t d",
)


def _prepare(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h0: Tensor | None,
    starts: Tensor | None,
    gate: Tensor | None,
) -> list[Tensor]:
    """Check shapes, fill in D and h0, and bring everything to the dtype of the sums."""
    b, _, d, n = SHAPES(u, dt, A, B, C, D, h0, starts, gate)
    wide = torch.promote_types(u.dtype, torch.float32)
    D = u.new_zeros(d, dtype=wide) if D is None else D
    h0 = u.new_zeros(b, d, n, dtype=wide) if h0 is None else h0
    return [v.to(wide) for v in (u, dt, A, B, C, D, h0)]


def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    h0: Tensor,
    starts: Tensor | None,
    keep: bool,
    pieces: int,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last h, and where `keep` the states before every block of `scan_blocks`."""
    if _by_blocks(u):
        return scan_blocks.forward(u, dt, A, B, C, D, h0, starts, keep, pieces, steps)
    y, last, before = scan_blocks.results(u, h0, keep, steps)
    for here in _pieces(u, A.shape[1]):
        y[..., here], last[:, here] = selective_scan_chunked(
            u[..., here], dt[..., here], A[here], B, C, D[here], h0[:, here], starts
        )
    return y, last, before.zero_()


def _backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    h0: Tensor,
    starts: Tensor | None,
    before: Tensor,
    dy: Tensor,
    dh: Tensor,
    pieces: int,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C, D and h0 from those of y and the last h."""
    if _by_blocks(u):
        return scan_blocks.backward(u, dt, A, B, C, D, starts, before, dy, dh, pieces, steps)
    du, ddt, dA, dB, dC, dD, dh0 = scan_blocks.rooms(u, dt, A, B, C, D, dh)
    dB.zero_()
    dC.zero_()
    for here in _pieces(u, A.shape[1]):
        given = (u[..., here], dt[..., here], A[here], B, C, D[here], h0[:, here], starts)
        parts = _chunked_gradients(*given, dy[..., here], dh[:, here])
        du[..., here], ddt[..., here], dA[here], more_B, more_C, dD[here], dh0[:, here] = parts
        dB += more_B
        dC += more_C
    return du, ddt, dA, dB, dC, dD, dh0


def _pieces(u: Tensor, n: int) -> list[slice]:
    """Channels that are worked on together, so that PIECE_STATES are enough; one at least."""
    b, t, d = u.shape
    size = max(1, PIECE_STATES // (b * t * n))
    return [slice(start, min(start + size, d)) for start in range(0, d, size)]


class _Scan(torch.autograd.Function):
    """`_forward` with `_backward` as its gradient, and beyond that `selective_scan_chunked`'s."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        y, h, before = _forward(*arguments)
        _save(ctx, arguments, (y, h, before))
        return y, h

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor, dh: Tensor
    ) -> tuple[Tensor | None, ...]:
        *inputs, before = ctx.saved_tensors
        if autodiff.too_narrow(dy, dh):
            found = autodiff.gradients(selective_scan_chunked, inputs, (dy, dh))
            return *found, None, None, None
        arguments: list[Any] = [*inputs, before, dy, dh, *ctx.sizes]
        return *_backward(*arguments), None, None, None, None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, _, pieces, steps = inputs
    ctx.sizes = pieces, steps
    ctx.save_for_backward(*given, output[2])


# A compiled graph holds a scan as one node, which runs the same code; traced through, the loop
# over time would be thousands.
_scan_node = torch.library.custom_op("kizzasi::selective_scan", _forward, mutates_args=())
_scan_node_backward = torch.library.custom_op(
    "kizzasi::selective_scan_backward", _backward, mutates_args=()
)


@_scan_node.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, *_, h0, _, keep, _, steps = arguments
    return scan_blocks.results(u, h0, keep, steps)


@_scan_node_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    u, dt, A, B, C, D, *_, dh, _, _ = arguments
    return scan_blocks.rooms(u, dt, A, B, C, D, dh)


def _differentiate(ctx: Any, dy: Tensor, dh: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _scan_node_backward(*ctx.saved_tensors, dy, dh, *ctx.sizes)
    return *gradients, None, None, None, None


_scan_node.register_autograd(_differentiate, setup_context=_save)


SELECTIVE_SCAN = Engines(
    "selective_scan",
    reference=selective_scan_ref,
    torch=selective_scan,
    native="kizzasi.models.ops.native.selective_scan:selective_scan",
    triton="kizzasi.models.ops.triton.selective_scan:selective_scan",
)
