"""RWKV-4's recurrence: a softmax-like average of all values so far, with a decay per channel.

Symbols: b batch, t time, d channels, c steps in a chunk, z number of chunks.

| here | paper | meaning |
|---|---|---|
| w (d) | -w | log of the decay, w < 0 |
| u (d) | u | bonus of the present token |
| num, den (b,d) | a, b | weighted sums of the values, and of the weights, times exp(-max) |
| max (b,d) | p | the largest log weight so far: no exponential exceeds 1 |

Source: Peng et al. 2023, arXiv:2305.13048, section 3 and appendix D.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kizzasi.models.ops.chunks import chunks
from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.precision import in_full_precision
from kizzasi.models.ops.shapes import Shapes


class WKV4State(NamedTuple):
    """num, den, max, each (b, d): the sums are num exp(max) and den exp(max). den = 0 is empty.

    `max` only says in which unit num and den are measured. It gets no gradient on the way out;
    num and den carry all of it.
    """

    num: Tensor
    den: Tensor
    max: Tensor


@in_full_precision
def wkv4_ref(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: WKV4State | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, WKV4State]:
    """Average the values one token at a time.

        y[t]   = (num[t-1] + exp(u + k[t]) v[t]) / (den[t-1] + exp(u + k[t]))
        num[t] = exp(w) num[t-1] + exp(k[t]) v[t]
        den[t] = exp(w) den[t-1] + exp(k[t])

    This loop is the definition; `wkv4` must agree with it. O(t) steps.

    Args:
        w: (d,) log of the decay, < 0.
        u: (d,) what the present token's key gets on top.
        k: (b, t, d) log weights, any finite size.
        v: (b, t, d) values.
        state: carried in; empty if None.
        starts: (b, t) bool, True where the memory is emptied before the token.

    Returns:
        (b, t, d) every y[t], and the last state.

    Raises:
        ShapeError: k and v differ in shape, or w and u do not fit them.
    """
    state = _check(w, u, k, v, state)
    states = []
    for t in range(k.shape[1]):
        if starts is not None:
            state = WKV4State(*(leaf.masked_fill(starts[:, t, None], 0.0) for leaf in state))
        states.append(state)
        state = _write(state, w, k[:, t], v[:, t])
    held = zip(*states, state, strict=True)
    num, den, top = (torch.stack(leaves, 1)[:, :-1] for leaves in held)
    return _read(WKV4State(num, den, top), u + k, v), state


@in_full_precision
def wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: WKV4State | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, WKV4State]:
    """Compute what `wkv4_ref` computes in about 2 sqrt(t) steps.

    All chunks of about sqrt(t) tokens advance together, each from nothing; then what enters each
    chunk is found chunk by chunk, and added. This is done for max, and then, with every exponent
    known and not positive, for (num, den).

    Args, Returns, Raises: as `wkv4_ref`.
    """
    state = _check(w, u, k, v, state)

    def run(k: Tensor, v: Tensor, *state: Tensor) -> tuple[Tensor, WKV4State]:
        return _by_chunks(w, u, k, v, WKV4State(*state), starts)

    return isolated(run, starts, (k, v), (), state)


def _by_chunks(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: WKV4State, starts: Tensor | None
) -> tuple[Tensor, WKV4State]:
    (b, t, d), c = k.shape, math.isqrt(k.shape[1] - 1) + 1
    resets = k.new_zeros(b, t, 1)
    if starts is not None:
        resets = resets.masked_fill(starts.unsqueeze(-1), -math.inf)
    resets, k, v = (chunks(x, c) for x in (resets, k, v))
    log_decay = w + resets
    until = log_decay.cumsum(2)  # from the entry of the chunk
    first = _log_unit(state).view(b, 1, 1, d)
    with torch.no_grad():
        top, entry = _running_max(log_decay, until, k, first)
    entry = torch.cat([first, entry[:, 1:]], 1)  # the first one has a gradient
    before = torch.cat([entry, top[:, :, :-1]], 2)
    decay, weight = (before + log_decay - top).exp(), (k - top).exp()
    carried = (entry + until - top).exp()

    written = torch.stack([weight * v, weight])
    within = [written[..., 0, :]]
    for decay_i, written_i in zip(decay.unbind(2)[1:], written.unbind(3)[1:], strict=True):
        within.append(torch.addcmul(written_i, decay_i, within[-1]))
    held = [torch.stack([state.num, state.den])]
    for carried_j, end_j in zip(carried[:, :, -1].unbind(1), within[-1].unbind(2), strict=True):
        held.append(torch.addcmul(end_j, carried_j, held[-1]))
    enters = torch.stack(held[:-1], 2).unsqueeze(3)
    sums = torch.addcmul(torch.stack(within, 3), carried, enters)
    prior = torch.cat([enters, sums[..., :-1, :]], 3)
    y = _average(prior[0], prior[1], before + resets, u + k, v)
    num, den, last = (x[:, -1, (t - 1) % c] for x in (sums[0], sums[1], top))
    return y.flatten(1, 2)[:, :t], WKV4State(num, den, last)


@in_full_precision
def wkv4_step(
    state: WKV4State, w: Tensor, u: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, WKV4State]:
    """One token of `wkv4_ref`: k and v are (b, d); returns y (b, d) and the new state."""
    return _read(state, u + k, v), _write(state, w, k, v)


class WKV4Sums:
    """`wkv4_step` of inputs of one dtype, again and again, with sums that are written into.

    Reading and writing go through the same exponentials, so both are computed at once: the first of
    two rows is what is read, the second what is written.

    Args:
        state: what is continued, and left as it is.
        w, u: as for `wkv4_ref`.
    """

    def __init__(self, state: WKV4State, w: Tensor, u: Tensor) -> None:
        self.sums = torch.stack([state.num, state.den])
        self.top = _log_unit(state)
        self.decay = torch.stack([torch.zeros_like(w), w]).unsqueeze(1)
        self.bonus = torch.stack([u, torch.zeros_like(u)]).unsqueeze(1)
        self.written = torch.ones_like(self.sums)

    def step_(self, k: Tensor, v: Tensor) -> Tensor:
        """k and v (b, d) to y (b, d)."""
        held, present = self.top + self.decay, k + self.bonus
        unit = torch.maximum(held, present)
        held, present = held.sub_(unit).exp_(), present.sub_(unit).exp_()
        self.top = unit[1]
        self.written[0] = v
        num, den = torch.addcmul(held[0] * self.sums, present[0], self.written).unbind()
        self.sums.mul_(held[1]).addcmul_(present[1], self.written)
        return num.div_(den)

    def value(self) -> WKV4State:
        num, den = (x.clone() for x in self.sums)
        return WKV4State(num, den, torch.where(den == 0, 0.0, self.top))


def _read(state: WKV4State, log_weight: Tensor, v: Tensor) -> Tensor:
    """The average of what is held and of v."""
    return _average(state.num, state.den, _log_unit(state), log_weight, v)


def _write(state: WKV4State, w: Tensor, k: Tensor, v: Tensor) -> WKV4State:
    """Fade what is held and add v."""
    top = _log_unit(state)
    after = torch.maximum(top + w, k).detach()
    decay, weight = (top + w - after).exp(), (k - after).exp()
    return WKV4State(decay * state.num + weight * v, decay * state.den + weight, after)


def _average(num: Tensor, den: Tensor, top: Tensor, log_weight: Tensor, v: Tensor) -> Tensor:
    """(exp(top) num + exp(log_weight) v) / (exp(top) den + exp(log_weight))."""
    unit = torch.maximum(top, log_weight).detach()
    past, present = (top - unit).exp(), (log_weight - unit).exp()
    return (past * num + present * v) / (past * den + present)


def _log_unit(state: WKV4State) -> Tensor:
    """max, and -infinity where nothing is held."""
    return state.max.masked_fill(state.den == 0, -math.inf)


def _running_max(
    log_decay: Tensor, until: Tensor, k: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """top[t] = max(top[t-1] + log_decay[t], k[t]), and top before each chunk (b, z, 1, d)."""
    within = [k[:, :, 0]]
    for decay_i, k_i in zip(log_decay.unbind(2)[1:], k.unbind(2)[1:], strict=True):
        within.append(torch.maximum(within[-1] + decay_i, k_i))
    entry = [first[:, 0, 0]]
    for until_j, end_j in zip(until[:, :, -1].unbind(1), within[-1].unbind(1), strict=True):
        entry.append(torch.maximum(entry[-1] + until_j, end_j))
    enters = torch.stack(entry[:-1], 1).unsqueeze(2)
    return torch.maximum(torch.stack(within, 2), enters + until), enters


SHAPES = Shapes(k="b t d", v="b t d", w="d", u="d", num="b d", den="b d", max="b d")


def _check(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: WKV4State | None) -> WKV4State:
    """Compare shapes; the state to start from."""
    b, _, d = SHAPES(k, v, w, u, *(state or (None, None, None)))
    if state is None:
        zeros = k.new_zeros(b, d)
        return WKV4State(zeros, zeros, zeros)
    return state


WKV4 = Engines("wkv4", reference=wkv4_ref, torch=wkv4)
